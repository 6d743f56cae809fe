"""What PyTorch keeps for the whole process or for a whole model, and how it is borrowed and given back.

``switches`` are settings of the process, ``isolation`` restores a model, ``devices`` says what a device can do,
``outputs`` finds tensors inside anything, ``stack`` the line of the user that a warning is about.
"""
