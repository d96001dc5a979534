"""Generation for one user: a prompt and a file of items in, an answer out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from personaplug.backends.base import GenerationConfig
from personaplug.config import EvaluationConfig
from personaplug.data.base import Task
from personaplug.errors import BadRecord, MissingData
from personaplug.personalizer import Personalizer
from personaplug.records import HistoryItem
from personaplug.run import Run, open_models
