"""Data sets: what one is, and the interchangeable readers of them.

Each file uses only those before it: `base` (task, reader, report), `fields` (what a value of a file means),
`streaming` (files read piece by piece), `tasks` (those there are), `lamp` (LaMP's layout, read), `writing` (the same,
written), `slicing` (a split in two, by user), `tabular` (an app's log), `simulated` (users whose tastes are known).
"""

from personaplug.data.lamp import LampReader, open_dataset, read_items
from personaplug.data.tasks import LAMP_TASKS, load_task
from personaplug.data.writing import write_lamp

__all__ = ["LAMP_TASKS", "LampReader", "load_task", "open_dataset", "read_items", "write_lamp"]
