"""`python -m lorasmith`."""

from lorasmith.cli import main

if __name__ == "__main__":
    main()
