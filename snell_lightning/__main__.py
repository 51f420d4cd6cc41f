"""`python -m snell_lightning fit --config vit.yaml`."""

import gc
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
        if sys.argv[1:2] == ["memory"]:
            # A plan is out in seconds, of which the last one and a half would go to a search for garbage at the exit.
            gc.freeze()
