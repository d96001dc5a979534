"""Data sets: what one is (`base`), and the interchangeable readers (`lamp`, `tabular`, `simulated`)."""

from personaplug.data.lamp import LAMP_TASKS, LampReader, load_task, open_dataset, write_lamp

__all__ = ["LAMP_TASKS", "LampReader", "load_task", "open_dataset", "write_lamp"]
