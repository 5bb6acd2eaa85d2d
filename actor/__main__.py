from actor.cli import actor
from common.cli import standalone

if __name__ == "__main__":
    standalone(actor)
