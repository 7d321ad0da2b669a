"""Resumable output: the solved weights of an unfinished run on the disk, and the journal that a later run replays.

`store.py` keeps both, `records.py` is the format of the journal, `locked_folder.py` the folder that they are in. The
room may import what engine/ may. It never solves a weight, and never reads or writes outside that folder, whatever a
journal says.
"""
