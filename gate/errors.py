"""What goes wrong in training and around it because of what a person gave: the message is one line to act on."""


class GateError(ValueError):
    """Base: checkpoints, records, graders and prompts that cannot be used as they are."""
