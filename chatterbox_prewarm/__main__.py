"""`python -m chatterbox_prewarm`."""

from chatterbox_prewarm.cli import main

if __name__ == "__main__":
    main()
