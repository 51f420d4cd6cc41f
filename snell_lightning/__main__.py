"""`python -m snell_lightning fit --config vit.yaml`."""

import sys

from snell_lightning.help import help_for
from snell_lightning.waiting import spin_briefly

if __name__ == "__main__":
    # Before anything heavy is imported.
    if (text := help_for(sys.argv[1:])) is not None:
        print(text)
    else:
        spin_briefly()
        from snell_lightning.cli import main

        main()
