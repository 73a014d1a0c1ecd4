"""``python -m bench gpu``: everything that needs a GPU, in one command.

``command`` runs the phases, each in a process of its own: ``test_run`` and ``sanitizer`` test, ``operators`` and
``step`` measure. ``report``, ``goals`` and ``plot`` say what came out.
"""
