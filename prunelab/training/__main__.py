"""``python -m prunelab.training NAME`` trains a network of the zoo; ``--help`` lists the options."""

from prunelab.training.checkpoints import main

if __name__ == "__main__":
    main()
