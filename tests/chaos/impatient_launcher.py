"""The launcher, which replaces a worker soon after it was declared lost: a test cannot wait for a minute."""

from services.worker import launcher

if __name__ == "__main__":
    launcher.LOST_POLL_SECONDS, launcher.LOST_SECONDS = 0.5, 2.0
    launcher.main()
