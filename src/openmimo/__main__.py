"""`python -m openmimo`, which is what `torchrun -m openmimo` starts."""

from openmimo.cli.main import main

if __name__ == "__main__":
    main()
