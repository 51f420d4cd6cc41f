"""`python -m snell_lightning fit --config vit.yaml`."""

from snell_lightning.cli import main

if __name__ == "__main__":
    main()
