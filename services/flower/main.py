"""Starts Flower on our broker, with the configuration beside this file."""

from pathlib import Path

from flower.views.monitor import Metrics
from tornado.web import authenticated

from shared.logging import configure_logging
from shared.queueing.celery_app import create_app
from shared.settings import load_settings

CONFIGURATION = Path(__file__).with_name("flowerconfig.py")


def main() -> None:
    settings = load_settings()
    if settings.flower_password is None:
        raise SystemExit("LAMPLIGHTER_FLOWER_PASSWORD is not set: Flower shows nothing to strangers.")
    # Flower 2.2 shows its metrics, with the names of models in them, to whoever asks.
    Metrics.get = authenticated(Metrics.get)
    configure_logging("flower", settings.log_level)
    app = create_app(settings.redis_url.get_secret_value())
    app.start(["--quiet", "flower", f"--conf={CONFIGURATION}"])


if __name__ == "__main__":
    main()
