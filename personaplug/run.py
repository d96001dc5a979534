"""A run: a folder that holds a resolved config, the task, the vectors, the trained plugs and the evaluations.

RUN/config.yaml               every setting, as resolved, and a checksum of them
RUN/run.json                  task, versions
RUN/data.json                 fingerprint of what it is trained on
RUN/vectors/                  item vectors (unless they are kept elsewhere)
RUN/plug/seed-0/              a trained plug; beside it log.jsonl and, while unfinished, the states to go on from
RUN/instruction-only/seed-0/  its control; what other rows of a table need lies beside them in the same way
RUN/profiles.jsonl            profiles that the model wrote, if a row needs them
RUN/users/                    matrices of single users, if a row needs them
RUN/evaluations/dev/          predictions in LaMP's format, scores per sample
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personaplug.config import Config, PlugConfig
from personaplug.config_parsing import with_values
from personaplug.config_resolution import resolved
from personaplug.data.records import Sample
from personaplug.data.splits import drawn
from personaplug.data.task import Reader, Task
from personaplug.data.task_registry import parse_task
from personaplug.data.wording import Wording, learn_wordings
from personaplug.encoders import Encoder, open_encoder
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, encoded, samples_fingerprint
from personaplug.errors import ConfigError, DamagedFile, MissingData, RunConflict
from personaplug.infra.atomic_io import write_checked_json
from personaplug.infra.checksums import check_json, read_json
from personaplug.infra.config_file import read_config, write_config
from personaplug.infra.distributed import connect, is_main, main_first
from personaplug.infra.environment import machine_info, package_versions
from personaplug.infra.links import check_links
from personaplug.infra.training_facts import read_facts
from personaplug.llm.base import LanguageModel
from personaplug.llm.loading import choose_device, open_llm
from personaplug.llm.prompt_tokenizer import today
from personaplug.plug.model import PersonaPlug

TASKS_FILE, SHARED_TRAINING = "tasks.json", "shared"
"""In the folder of a shared run, beside the runs of its tasks; see `shared_run`."""

FIXED = ("model", "plug", "training", "retrieval", "adapter")
"""The sections of a config that trained parts depend on."""

SPEED_ONLY = ("model.device", "model.encoder_engine", "model.prompt_cache", "model.prompt_cache_gigabytes")
"""Settings in them that decide how fast the same is done, and where."""

_REMEDY = "Restore it, or train again in a new folder."
_MOVABLE = ("model.llm", "model.encoder", *SPEED_ONLY)  # settings that may be edited when a run is moved


@dataclass(frozen=True)
class Models:
    """The two frozen models of a config, loaded."""

    encoder: Encoder
    llm: LanguageModel


def open_models(config: Config) -> Models:
    """Load encoder and language model.

    Raises:
        MissingModel: if one of them is found nowhere.
        MissingExtra: if the encoder's engine is not installed.
    """
    device, engine = choose_device(config.model.device), config.model.encoder_engine
    encoder = open_encoder(config.model.encoder, device=device, engine=engine)
    return Models(encoder, open_llm(config.model))


@dataclass(frozen=True)
class Run:
    """A run's folder and what it was made with.

    Attributes:
        folder: where everything lies.
        config: resolved.
        task: what is asked.
        vectors: folder of the item vectors.
        creates_vectors: whether that folder is created if it does not exist. A run that is opened creates none outside
            its own folder.
        shared_labels: the labels of all tasks that share a plug; none if the run's task is alone.
    """

    folder: Path
    config: Config
    task: Task
    vectors: Path
    creates_vectors: bool = True
    shared_labels: tuple[str, ...] | None = None

    @classmethod
    def create(cls, folder: str | Path, *, config: Config, task: Task, vectors: str | Path | None = None) -> Run:
        """Start a run, or go on with the same one; see `plan`."""
        run = cls.plan(folder, config=config, task=task, vectors=vectors)
        run.start()
        return run

    @classmethod
    def plan(
        cls,
        folder: str | Path,
        *,
        config: Config,
        task: Task,
        vectors: str | Path | None = None,
        shared_labels: tuple[str, ...] | None = None,
    ) -> Run:
        """Return a run to `start`, without writing anything. The seeds of a run that exists may change.

        Raises:
            RunConflict: if the folder holds something else, or a run in which something was trained or evaluated with
                another task or other settings of models, plug or training.
            ConfigError: if several processes cannot work together here.
        """
        connect(choose_device(config.model.device))
        place = Path(vectors).absolute() if vectors else Path(folder, "vectors")
        return main_first(
            lambda: cls(
                Path(folder), resolved(dated(config, folder), task), task, place, shared_labels=shared_labels
            )._planned(has_place=bool(vectors))
        )

    def _planned(self, *, has_place: bool) -> Run:
        run, folder = self, self.folder
        if folder.exists() and not folder.is_dir():
            raise RunConflict(f"{folder} is a file; a run needs a folder. Choose another --out.")
        if (folder / "run.json").exists():
            there = Run.open(folder)
            if run.shared_labels is None:
                run = replace(run, shared_labels=there.shared_labels)
            run = run if has_place else replace(run, vectors=there.vectors, creates_vectors=there.creates_vectors)
            if there._is_begun:
                run._check_same(there)
        elif folder.exists() and {path.name for path in folder.iterdir()} - {"vectors", "config.yaml"}:
            raise RunConflict(f"{folder} is neither empty nor a run of personaplug. Choose another --out.")
        return run

    def start(self) -> None:
        """Write the run's description.

        Raises:
            RunConflict: if a process does not see the folder.
        """
        main_first(self._start)

    def _start(self) -> None:
        if is_main():
            self._write()
        elif not (self.folder / "run.json").exists():
            raise RunConflict(
                f"Not every process sees {self.folder}. On several machines --out must be a folder that all of them "
                f"share."
            )

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a run that exists.

        Raises:
            MissingData: if the folder holds none (DamagedFile: one that was changed).
            ConfigError: if it was made with a setting that there is no more.
            RunConflict: if a link leads out of the folder.
        """
        folder = Path(folder)
        path = folder / "run.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if (folder / TASKS_FILE).is_file():
                raise MissingData(
                    f"{folder} holds the runs of several tasks, each in a folder of its task's name. Give one of these "
                    f"folders."
                ) from error
            raise MissingData(
                f"{folder} holds no run: run.json is missing or broken. `personaplug train --out {folder}` makes one."
            ) from error
        if not isinstance(about, dict) or not isinstance(about.get("task"), dict):
            raise ConfigError(f"{path} should hold an object with the run's `task`; found something else.")
        task = parse_task(about["task"], source=str(path))
        place, labels = about.get("vectors"), about.get("shared_labels")
        if not isinstance(place, str | None):
            raise ConfigError(f"{path}: `vectors` should be a folder or null; found something else.")
        if not isinstance(labels, list | None):
            raise ConfigError(f"{path}: `shared_labels` should be a list or null; found something else.")
        check_json(about, path, remedy=_REMEDY)
        check_links(folder)
        vectors = Path(place) if place else folder / "vectors"
        is_inside = vectors.resolve().is_relative_to(folder.resolve())
        config = read_config(folder / "config.yaml", unchecked=_MOVABLE, run=str(about.get("id", "")))
        return cls(folder, config, task, vectors, is_inside, None if labels is None else tuple(labels))

    @property
    def item_labels(self) -> tuple[str, ...]:
        """The labels that answers of items may be: the task's, or those of all tasks that share a plug."""
        return self.task.labels if self.shared_labels is None else self.shared_labels

    @property
    def id(self) -> str:
        """The name that its files share, so that a file of another run is detected; empty before the start."""
        path = self.folder / "run.json"
        return str(read_json(path, remedy=_REMEDY).get("id", "")) if path.exists() else ""

    def asked(self, task: Task) -> Run:
        """Return the run for questions of another task, which its plugs can be asked if both are conversations.

        Raises:
            ConfigError: if the answers are of another kind.
        """
        if task == self.task:
            return self
        if (self.task.kind, task.kind) != ("chat", "chat") or task.field_names != self.task.field_names:
            raise ConfigError(
                f"{task.name} asks for answers of another kind than {self.task.name}, which the run was trained on. "
                f"Give data of {self.task.name}, or train a run on {task.name}."
            )
        return replace(self, task=task)

    def plug_folder(self, name: str, *, seed: int) -> Path:
        """Where what was trained under a name (a plug, its control, matrices, a retriever) is, for one seed."""
        return self.folder / name.replace(":", "-") / f"seed-{seed}"

    def trained(self, name: str, *, seed: int) -> bool:
        """Whether the training of that name has ended."""
        return self.training_facts(name, seed=seed) is not None

    def training_facts(self, name: str, *, seed: int) -> dict[str, Any] | None:
        """What the training of that name was; None if it has not ended.

        Raises:
            DamagedFile: if the file that says so is damaged, or it or its weights are of another training.
        """
        return read_facts(self.plug_folder(name, seed=seed), owner=self.owner(name, seed=seed))

    def owner(self, name: str, *, seed: int) -> str:
        """A name of one training of this run, for its files."""
        return f"{self.id} {self.plug_folder(name, seed=seed).parent.name} {seed}"

    def check_trained(self, name: str, *, seed: int) -> Path:
        """The folder of a training that has ended.

        Raises:
            MissingData: if it has not.
        """
        folder = self.plug_folder(name, seed=seed)
        if not self.trained(name, seed=seed):
            raise MissingData(
                f"{folder} holds no finished training. Leave {name} out of --methods, or repeat this run's "
                f"`personaplug train`, with all its settings, and add --methods {name}."
            )
        return folder

    def load_plug(self, name: str, *, seed: int, models: Models) -> PersonaPlug:
        """Load a trained plug.

        Raises:
            MissingData: if its training has not ended.
        """
        folder = self.check_trained(name, seed=seed)
        plug = PersonaPlug.from_pretrained(folder, encoder=models.encoder, llm=models.llm.identity)
        return plug.compute_items_in(models.llm.dtype).to(models.llm.device)

    def open_vectors(self, encoder: Encoder) -> EmbeddingStore:
        """The run's table of item vectors.

        Raises:
            MissingData: if an opened run names a folder outside its own that holds none.
        """
        if not self.creates_vectors and not (self.vectors / "table.json").is_file():
            raise MissingData(
                f"{self.folder / 'run.json'} names {self.vectors} for the item vectors, outside the run; it "
                f"holds none. Restore that folder, or give `personaplug train` another one by --vectors."
            )
        return EmbeddingStore.open(self.vectors, encoder)

    def read_samples(
        self,
        reader: Reader,
        table: EmbeddingStore,
        *,
        limit: int = 0,
        seed: int = 0,
        plug: PlugConfig | None = None,
        rewrite: Callable[[Sample], Sample] = lambda sample: sample,
    ) -> list[EncodedSample]:
        """Read a split into samples whose items are rows of the table; texts of histories do not stay in memory.

        Args:
            limit: take this many samples, drawn by `seed`; 0 = all.
            plug: which plug reads the items; None = the run's own.
            rewrite: gives a sample another prompt while its texts are at hand.
        """
        samples = (rewrite(sample) for sample in drawn(reader, limit=limit, seed=seed))
        return encoded(samples, table, plug=plug or self.config.plug, labels=self.item_labels)

    def check_unchanged(self, config: Config) -> None:
        """Check that a config differs from the run's own in nothing that its plugs depend on.

        Raises:
            RunConflict: naming the settings that differ.
        """
        names = _differing(resolved(dated(config, self.folder), self.task), self.config)
        if names:
            raise RunConflict(
                f"{', '.join(names)} cannot be changed after training; {self.folder} was made with other "
                f"values. Leave them out, or train another run."
            )

    def check_models(self, models: Models) -> None:
        """Check that prompts hold the run's day, if they hold one.

        Raises:
            RunConflict: if the models were opened with another `chat_date`.
        """
        day, of_run = models.llm.identity.chat_date, self.config.model.chat_date
        if day not in (None, of_run):
            raise RunConflict(
                f"The chat template writes the day {of_run} in the prompts of {self.folder}; the models given write "
                f"{day}. Open them with open_models(run.config)."
            )

    def check_data(self, samples: Sequence[EncodedSample], table: EmbeddingStore) -> None:
        """Note what the run is trained on, or check that it is what an earlier start noted.

        Raises:
            RunConflict: if the run was started on other data.
        """
        users = sorted({_anonymous(sample.user_id) for sample in samples if sample.user_id is not None})
        about = {"samples": len(samples), "fingerprint": samples_fingerprint(samples, table), "users": users}
        about["wordings"] = list(map(asdict, () if self.task.kind == "chat" else learn_wordings(samples)))
        before = self._data() or about
        if before["fingerprint"] != about["fingerprint"]:
            raise RunConflict(
                f"{self.folder} was started on other training data than what is given now. Give the same data to go "
                f"on, or choose another --out."
            )
        if is_main():
            write_checked_json(self.folder / "data.json", {**about, "run": self.id})

    def export(self, folder: Path, names: Sequence[str]) -> None:
        """Write a run that holds nothing of any user: settings, task, wordings, and what was trained under `names`."""
        for place in [self.check_trained(name, seed=seed) for seed in self.config.training.seeds for name in names]:
            unneeded = shutil.ignore_patterns("log.jsonl", "tensorboard", ".*")
            shutil.copytree(place, folder / place.relative_to(self.folder), ignore=unneeded, dirs_exist_ok=True)
        shutil.copyfile(self.folder / "config.yaml", folder / "config.yaml")
        write_checked_json(folder / "data.json", {**self._data(), "users": [], "run": self.id})
        about = read_json(self.folder / "run.json", remedy=_REMEDY)
        write_checked_json(folder / "run.json", {**about, "vectors": None})  # last: it makes the folder a run

    def _data(self) -> dict[str, Any]:
        """What is noted of the training data; nothing if nothing has been trained."""
        path = self.folder / "data.json"
        if not path.exists():
            return {}
        about = read_json(path, remedy=_REMEDY)
        if about.get("run", "") != self.id:
            raise DamagedFile(path, reason="it is of another run", remedy=_REMEDY)
        return about

    @property
    def wordings(self) -> tuple[Wording, ...]:
        """The wordings of the training prompts; none if nothing has been trained."""
        return tuple(Wording(**wording) for wording in self._data().get("wordings", ()))

    @property
    def knows_its_data(self) -> bool:
        """Whether it is noted what the run is trained on."""
        return (self.folder / "data.json").exists()

    def users_trained_on(self, users: Iterable[str | None]) -> int:
        """How many of some users have samples among those that the run is trained on."""
        known = set(self._data().get("users", ()))
        return sum(_anonymous(user) in known for user in set(users) if user is not None)

    @property
    def _is_begun(self) -> bool:
        """Whether something in the folder depends on the settings: a training, an evaluation."""
        if any((self.folder / name).exists() for name in ("evaluations", "users", "profiles.jsonl")):
            return True
        files = list(self.folder.glob("*/seed-*/[!.]*"))
        if self.shared_labels is not None:  # states of the training that it shares lie beside it
            files += self.folder.parent.glob(f"{SHARED_TRAINING}/seed-*/[!.]*")
        return any(path.name not in ("log.jsonl", "tensorboard") for path in files)

    def _check_same(self, there: Run) -> None:
        names = [name for name in _differing(self.config, there.config) if name != "training.seeds"]
        if self.task != there.task:
            names.insert(0, "task")
        if self.shared_labels != there.shared_labels:
            names.append("set of tasks that share its plug")
        if names:
            raise RunConflict(
                f"{self.folder} holds a run with another {', '.join(names)}. Repeat that run's settings "
                f"(they are in its config.yaml) to go on with it, or choose another --out."
            )

    def _write(self) -> None:
        about = {
            "id": self.id or secrets.token_hex(8),
            "task": asdict(self.task),
            **({} if self.shared_labels is None else {"shared_labels": list(self.shared_labels)}),
            # Inside the run: nothing, so that the run may be moved.
            "vectors": None if self.vectors == self.folder / "vectors" else str(self.vectors),
            "versions": package_versions(),
            "machine": machine_info(),
        }
        if not self._is_begun:
            (self.folder / "data.json").unlink(missing_ok=True)  # of a start that failed before any training
        write_config(self.folder / "config.yaml", self.config, unchecked=_MOVABLE, run=str(about["id"]))
        write_checked_json(self.folder / "run.json", about)


def dated(config: Config, folder: str | Path) -> Config:
    """Settle `chat_date=auto`: the day of the run in a folder, or today if there is none yet."""
    if config.model.chat_date != "auto":
        return config
    is_run = (Path(folder) / "run.json").exists()
    day = Run.open(folder).config.model.chat_date if is_run else today()
    return with_values(config, {"model.chat_date": day})


def _anonymous(user: str) -> str:
    return hashlib.blake2b(user.encode(), digest_size=8).hexdigest()


def _differing(one: Config, other: Config) -> list[str]:
    left, right = asdict(one), asdict(other)
    differing = [f"{s}.{key}" for s in FIXED for key in left[s] if left[s][key] != right[s][key]]
    return [name for name in differing if name not in SPEED_ONLY]
