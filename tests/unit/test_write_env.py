"""What tools/write_env.py leaves: nothing that others may read on the way, and nothing written over."""

import stat
import subprocess
import sys

import pytest

from shared.settings import SetupSettings
from tests.support.servers import ROOT


def write_env(*arguments):
    command = [sys.executable, ROOT / "tools" / "write_env.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def made(tmp_path):
    done = write_env(tmp_path / ".env", "--host", "lamps.example")
    assert done.returncode == 0, done.stderr
    return tmp_path


def read(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_only_the_owner_gets_to_secrets_and_containers_can_read_each(made):
    assert stat.S_IMODE((made / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((made / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (made / "secrets").iterdir()} == {0o444}
    env = (made / ".env").read_text()
    assert f"LAMPLIGHTER_SECRETS={made / 'secrets'}\n" in env and env.endswith("[::1],gateway,lamps.example\n")
    assert not [value for value in read(made / "secrets").values() if value in env]


def test_the_set_up_takes_every_secret_from_its_file(made, monkeypatch):
    files = read(made / "secrets")
    container = made / "run-secrets"
    container.mkdir()
    for name in ("superuser_url", "admin_key", *(name for name in files if name.endswith("_password"))):
        (container / f"lamplighter_{name}").write_text(files[name])
    settings = SetupSettings(_secrets_dir=container)
    assert settings.passwords["worker"] == files["worker_password"]
    assert settings.superuser_url.get_secret_value().endswith("@postgres:5432/postgres")
    assert files["worker_database_url"] == (
        f"postgresql://lamplighter_worker:{files['worker_password']}@postgres:5432/lamplighter"
    )
    monkeypatch.setenv("LAMPLIGHTER_WORKER_PASSWORD", "change-me")
    with pytest.raises(ValueError, match="password of worker is missing, too short or well known"):
        SetupSettings(_secrets_dir=container)


def test_nothing_is_written_over(made):
    before = read(made / "secrets")
    (made / ".env").unlink()
    refused = write_env(made / ".env")
    assert refused.returncode == 1 and "there already" in refused.stderr
    assert read(made / "secrets") == before and not (made / ".env").exists()


def test_another_machine_gets_the_two_secrets_that_it_needs(made, tmp_path):
    other = tmp_path / "other"
    done = write_env(other / ".env", "--worker", "10.0.0.7", "--secrets", made / "secrets")
    assert done.returncode == 0, done.stderr
    files = read(other / "secrets")
    assert set(files) == {"worker_database_url", "redis_url"}
    assert "@10.0.0.7:5432/" in files["worker_database_url"] and "@10.0.0.7:6379/" in files["redis_url"]
    assert (other / ".env").read_text().splitlines() == [
        "LAMPLIGHTER_SECRETS=./secrets", "LAMPLIGHTER_STORE=", "LAMPLIGHTER_WEIGHTS=", "LAMPLIGHTER_MODELS=",
    ]  # fmt: skip


def test_secrets_that_stood_in_an_env_file_are_taken_over(tmp_path):
    old = tmp_path / "old.env"
    old.write_text(
        "# ours\nPOSTGRES_PASSWORD=postgres-of-before\nADMIN_KEY=lk-of-before\nLAMPLIGHTER_PORT=8001\n"
        "OUR_PROXY_PASSWORD=of-somebody\n"
    )
    done = write_env(tmp_path / "new" / ".env", "--from", old)
    assert done.returncode == 0, done.stderr
    files = read(tmp_path / "new" / "secrets")
    assert files["postgres_password"] == "postgres-of-before" and files["admin_key"] == "lk-of-before"
    assert files["superuser_url"] == "postgresql://postgres:postgres-of-before@postgres:5432/postgres"
    assert len(files["redis_password"]) == 48
    text = (tmp_path / "new" / ".env").read_text()
    assert "LAMPLIGHTER_PORT=8001\n" in text and "of-before" not in text
    assert "OUR_PROXY_PASSWORD=of-somebody\n" in text
    # Both are moved together afterwards, to where Compose takes a relative path from.
    assert "LAMPLIGHTER_SECRETS=./secrets\n" in text
