"""The launcher, starting chaos workers."""

from services.worker import launcher

if __name__ == "__main__":
    launcher.main("tests.chaos.worker")
