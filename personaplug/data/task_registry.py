"""The built-in LaMP tasks (without LaMP-6, which is not public), and tasks that a folder declares in its task.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from personaplug.data.json_stream import existing_folder, stream_values
from personaplug.data.parsing import Flaw, as_name, as_number
from personaplug.data.patterns import group_count
from personaplug.data.records import PREFERENCE, REJECTED
from personaplug.data.task import MAX_NEW_TOKENS, Task, TaskKind, template_parts
from personaplug.errors import ConfigError, MissingData, RunConflict, nearest
from personaplug.infra.json_parsing import parse_json
from personaplug.infra.validation import first_error

_MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip

# Fixed words delimit the candidates, so quotes inside a title do not end it.
_CANDIDATES = r'without explanation\. \[1\]: "(.*?)" \[2\]: "(.*)"\s*\Z'

_BUILT_IN = (
    Task("LaMP_1", "label", ("title", "abstract"), None, ("accuracy", "f1"),
         labels=("[1]", "[2]"), max_new_tokens=6, query_pattern=_CANDIDATES,
         item_template='"{title}"', history_after="title"),
    Task("LaMP_2", "label", ("description", "tag"), "tag", ("accuracy", "f1"),
         labels=_MOVIE_TAGS, query_after="description: ", max_new_tokens=12,
         item_template='the tag for the movie: "{description}" is "{tag}"'),
    Task("LaMP_3", "rating", ("text", "score"), "score", ("mae", "rmse", "accuracy"),
         labels=("1", "2", "3", "4", "5"), query_after="review: ", max_new_tokens=4,
         item_template='{score} is the score for "{text}"'),
    Task("LaMP_4", "text", ("title", "text"), "title", ("rouge_1", "rouge_l"), query_after="article: ",
         item_template='"{title}" is the title for "{text}"'),
    Task("LaMP_5", "text", ("title", "abstract"), "title", ("rouge_1", "rouge_l"), query_after="paper: ",
         item_template='"{title}" is a title for "{abstract}"',
         history_template="{history}. Following the given patterns {input}"),
    Task("LaMP_7", "text", ("text",), "text", ("rouge_1", "rouge_l"), query_after=": ",
         item_template='"{text}"',
         history_template="{history} are written by a person. Following the given patterns {input}"),
)  # fmt: skip

CHAT = Task("Chat", "chat", ("question", "answer"), "answer", ("rouge_1", "rouge_l"), max_new_tokens=256)
"""The task of conversations without a task.json."""

LAMP_TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _BUILT_IN})


def lamp_task(name: str) -> Task:
    """Return one of LaMP's tasks. `LaMP-1` is the same as `LaMP_1`."""
    key = name.strip().lower().replace("-", "_").replace("lamp", "LaMP")
    if key == "LaMP_6":
        raise ConfigError("LaMP_6 is not built in: it contains the Avocado emails, which are not public.")
    if key not in LAMP_TASKS:
        raise ConfigError(f"There is no built-in task {name!r}; {nearest(name, LAMP_TASKS)}")
    return LAMP_TASKS[key]


def _as_label(value: object) -> str:
    label = as_name(value, "a label")
    if label != label.strip():
        raise ValueError("a label has leading or trailing blanks; remove them")
    return label


def _are_different(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("the list contains an entry twice")
    return values


_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], Field(strict=False), AfterValidator(_are_different)]
_Label = Annotated[str, BeforeValidator(_as_label)]
_Labels = Annotated[tuple[_Label, ...], Field(strict=False), AfterValidator(_are_different)]


class _Declaration(BaseModel, frozen=True, extra="forbid", strict=True):
    """The keys of a task.json; `Task` describes them."""

    name: str
    kind: TaskKind
    item_fields: Annotated[_Texts, Field(min_length=1)]
    answer_field: _Text | None = None
    metrics: Annotated[_Texts, Field(min_length=1)]
    labels: _Labels = ()
    query_after: str = ""
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
    query_pattern: str = ""
    item_template: str = ""
    item_joint: str = Task.item_joint
    history_template: str = Task.history_template
    history_after: str = ""
    image_field: _Text | None = None
    vector_field: _Text | None = None
    name_field: _Text | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if not self.name.strip():
            raise ValueError("'name' is empty")
        if of_models := {"nll", "choice", "margin"}.intersection(self.metrics):
            raise ValueError(f"remove {min(of_models)!r} from 'metrics'; every language model gets this column anyway")
        fields = [*self.item_fields, *filter(None, (self.answer_field, self.image_field, self.vector_field))]
        if reserved := {"id", "date", PREFERENCE, REJECTED} & {*fields}:
            raise ValueError(f"{min(reserved)!r} is a reserved key of items; rename the field")
        extra = [name for name in (self.image_field, self.vector_field) if name is not None]
        if len({*extra}) < len(extra) or {*extra} & {*self.item_fields, self.answer_field}:
            raise ValueError("'image_field' and 'vector_field' name fields of their own, not those of texts")
        if self.name_field is not None and self.name_field not in {*self.item_fields} - {self.answer_field}:
            raise ValueError("'name_field' should be one of 'item_fields', and not 'answer_field'")
        if (self.kind in ("text", "chat")) == bool(self.labels):
            raise ValueError("the kinds 'label' and 'rating' need 'labels'; 'text' and 'chat' have none")
        if self.kind == "chat" and (self.query_after or self.query_pattern):
            raise ValueError("'chat' takes any prompt; remove 'query_after' and 'query_pattern'")
        is_exchange = len(self.item_fields) == 2 and self.answer_field == self.item_fields[1]
        if self.kind == "chat" and self.name_field is None and not is_exchange:
            raise ValueError("an item of 'chat' has two fields: the question, then 'answer_field'")
        if self.kind == "rating":
            try:
                numbers = [as_number(label, "a label") for label in self.labels]
            except Flaw:
                raise ValueError(f"the labels of a rating should be numbers, found {list(self.labels)}") from None
            if len(numbers) < 2:
                raise ValueError(f"a rating needs two labels or more, found {list(self.labels)}")
            if not all(low < high for low, high in pairwise(numbers)) or not all(abs(n) < 1e9 for n in numbers):
                raise ValueError(f"the labels of a rating should ascend and be within ±1e9, found {list(self.labels)}")
        return self

    @model_validator(mode="after")
    def _check_query(self) -> Self:
        if self.query_after and self.query_pattern:
            raise ValueError("give 'query_after' or 'query_pattern', not both")
        try:
            groups = group_count(self.query_pattern)
        except ValueError as error:
            raise ValueError(f"'query_pattern' is not a valid RE2 regular expression: {error}") from None
        if self.query_pattern and not groups:
            raise ValueError("'query_pattern' needs a group (…) around the query")
        return self

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        fields = {*self.item_fields, *([self.answer_field] if self.answer_field else [])}
        placeholders = template_parts(self.item_template)[1::2]
        for name in placeholders:
            if name not in fields:
                raise ValueError(f"'item_template' names {{{name}}}; {nearest(name, fields)}")
        if self.item_template and not placeholders:
            raise ValueError("'item_template' contains no field of an item; put the name of a field in braces")
        if sorted(template_parts(self.history_template)[1::2]) != ["history", "input"]:
            raise ValueError("'history_template' should contain {history} and {input}, each once")
        return self


_KEYS = ("like", *_Declaration.model_fields)
_KIND_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "label": {"metrics": ("accuracy", "f1"), "max_new_tokens": 16},
    "rating": {"metrics": ("mae", "rmse", "accuracy"), "max_new_tokens": 4},
    "text": {"metrics": ("rouge_1", "rouge_l"), "max_new_tokens": 128},
    "chat": {
        "item_fields": CHAT.item_fields,
        "answer_field": CHAT.answer_field,
        "metrics": CHAT.metrics,
        "max_new_tokens": CHAT.max_new_tokens,
    },
}


def parse_task(values: Mapping[str, Any], *, source: str = "task.json") -> Task:
    """Convert a declaration to a task. It has all keys, or `like` and the keys that differ."""
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{source}: unknown key {key!r}; {nearest(key, _KEYS)}")
    merged = {**_inherited(values, source), **{key: value for key, value in values.items() if key != "like"}}
    defaults = dict(_KIND_DEFAULTS.get(str(merged.get("kind")), {}))
    if merged.get("name_field") is not None:  # the items are concepts, not exchanges
        defaults.pop("answer_field", None)
    try:
        return Task(**dict(_Declaration.model_validate({**defaults, **merged})))
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_error(error)}.") from None


def _inherited(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    if "like" not in values:
        return {}
    if not isinstance(values["like"], str):
        raise ConfigError(f"{source}: 'like' should be the name of a built-in task, found {values['like']!r}.")
    inherited = asdict(lamp_task(values["like"]))
    # The two ways of finding the query exclude each other.
    if "query_after" in values or "query_pattern" in values:
        inherited.update(query_after="", query_pattern="")
    # Another kind has other labels, metrics and lengths.
    if values.get("kind", inherited["kind"]) != inherited["kind"]:
        for key in ("labels", "metrics", "max_new_tokens"):
            inherited.pop(key)
    # Wording that names fields is inherited only with these fields.
    merged = {**inherited, **values}
    has_same_fields = merged["item_fields"] in (inherited["item_fields"], list(inherited["item_fields"]))
    if not has_same_fields or merged["answer_field"] != inherited["answer_field"]:
        inherited.update(item_template="", history_after="")
    return inherited


def load_task(folder: str | Path, *, task: str | None = None) -> Task:
    """Determine the task of a folder.

    The order is: the name `task` (a built-in task, or the one in the folder's task.json), the folder's task.json,
    the key "task" in its `*_outputs.json[.gz]`.
    """
    folder = existing_folder(folder)
    declared = _declared_task(folder)
    if task is not None:
        return declared if declared and declared.name == task else lamp_task(task)
    return declared or _task_of_outputs(folder)


def _declared_task(folder: Path) -> Task | None:
    path = folder / "task.json"
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should contain one JSON object that declares a task, found {type(values).__name__}.")
    return parse_task(values, source=str(path))


def check_declared_task(folder: Path, task: Task) -> None:
    """Raise RunConflict if a folder declares another task."""
    if _declared_task(folder) not in (None, task):
        raise RunConflict(f"{folder / 'task.json'} declares a task other than {task.name}. Choose a new folder.")


def _task_of_outputs(folder: Path) -> Task:
    files: dict[str, str] = {}
    for path in sorted((*folder.glob("*_outputs.json"), *folder.glob("*_outputs.json.gz"))):
        if task := next(stream_values(path, "task", opening=b"{", unit="key"), None):
            files.setdefault(str(task[1]).replace("-", "_"), path.name)
    if len(files) > 1:
        raise ConfigError(f"{folder}: its files name different tasks: {files}. Choose one with `task`.")
    if not files:
        raise MissingData(
            f'{folder} declares no task: it has no task.json and no *_outputs.json[.gz] with the key "task". '
            f"Set `task` to one of {', '.join(LAMP_TASKS)}, or write a task.json."
        )
    name, file = next(iter(files.items()))
    try:
        return lamp_task(name)
    except ConfigError as error:
        raise ConfigError(f"{folder / file}: {error} Any other task needs a task.json in the folder.") from None
