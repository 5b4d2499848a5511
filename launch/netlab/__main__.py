"""`python -m launch.netlab`."""

from launch.netlab.command import main

if __name__ == "__main__":
    main()
