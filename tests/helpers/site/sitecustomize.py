"""Python runs this at its start in the programs of tests, which have this folder on PYTHONPATH.

A program of a test spends most of its time with imports, and a fifth of that with looks for garbage
among what it has just imported. Here it looks less often.
"""

import gc

gc.set_threshold(50_000, 20, 50)
