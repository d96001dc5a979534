"""Records of users, tasks, and readers for each data format."""

from personaplug.data.lamp import open_dataset, read_items
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.task_registry import LAMP_TASKS, load_task

__all__ = ["LAMP_TASKS", "load_task", "open_dataset", "read_items", "write_lamp"]
