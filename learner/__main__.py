from common.cli import standalone
from learner.cli import learner

if __name__ == "__main__":
    standalone(learner)
