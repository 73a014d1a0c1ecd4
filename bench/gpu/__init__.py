"""``python -m bench gpu``: everything that needs a GPU, in one command.

``command`` runs the phases, each in a process of its own, between ``cache`` that brings and keeps what is compiled.
``report`` and ``goals`` say what came out.
"""
