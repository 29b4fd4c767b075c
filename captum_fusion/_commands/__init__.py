"""The commands of ``captum-fusion``. Each is a module that holds its options, ``add``, and what it does, ``run``."""
