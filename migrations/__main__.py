"""`python -m migrations`: logins, schema and first admin key of a deployment, by its environment and its secrets."""

from sqlalchemy import create_engine, make_url

from shared.db.session import ROLE_PREFIX
from shared.db.setup import create_roles, ensure_admin_key, migrate
from shared.logging import configure_logging
from shared.settings import load_setup_settings


def main() -> None:
    settings = load_setup_settings()
    configure_logging("migrate")
    superuser_url = settings.superuser_url.get_secret_value()
    create_roles(superuser_url, settings.passwords, settings.database)
    url = make_url(superuser_url).set(
        drivername="postgresql+psycopg",
        username=f"{ROLE_PREFIX}migration",
        password=settings.passwords["migration"],
        database=settings.database,
    )
    engine = create_engine(url, hide_parameters=True, connect_args={"client_encoding": "utf8"})
    migrate(engine)
    ensure_admin_key(engine, settings.admin_key.get_secret_value())
    engine.dispose()


if __name__ == "__main__":
    main()
