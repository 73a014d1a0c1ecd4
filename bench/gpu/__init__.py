"""``python -m bench gpu``: everything that needs a GPU, in one command.

``command`` runs the phases, each in a process of its own; ``cache`` brings and keeps what is compiled; ``report`` says
what came out.
"""
