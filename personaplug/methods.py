"""Every row of a results table by name: what is trained for it, whose history it sees, what stands in its prompt.

    plain  instruction-only  plug                            the untouched model, the task alone, the method
    paper-plug                                               the plug as the paper has it, at the same place
    bm25:4  recency:4  dense:4  random:4  ropg:4             the best 4 items of the history, written into the prompt
    instruction+bm25:4                                       the same, with soft tokens trained on such prompts
    instruction+labels                                       such tokens, and what counting the user's own labels says
    plug+bm25:1  plug+dense:1                                the plug beside retrieved items, trained together
    plug+phrases  instruction+phrases  plug+bm25:1+phrases   with what the user's own answers go on with mixed in
    profile  profile+bm25:4                                  what the model itself wrote of the user
    lora  lora-per-user                                      matrices in the model: the task's alone, and each user's
    plug+lora                                                a plug for the model that carries the task's matrices
    classical  classical:text  classical:history             a regression in the model's place: on words, on the history
    user-median  user-mean  user-majority                    a rule on the user's own answers
    copy  copy:10                                            the query itself, or its first 10 words
    user-words:8                                             the 8 words that most of the user's own texts hold
    NAME@wrong-user  NAME@shuffled                           any of them, shown a stranger's history, or another order
    wrong-user  shuffled  random-vectors  mean-persona  population-persona        the controls of the plug

The controls are rows like any other. A method's personal gain is its distance from its own wrong-user row. Rows
without a language model say what a set gives away for nothing, and their gains whether there is anything personal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from personaplug.config import PAPER, PlugConfig
from personaplug.errors import ConfigError, nearest

RETRIEVERS = ("bm25", "recency", "dense", "random", "ropg")
WRONG_USER: Final = "wrong-user"
SHUFFLED: Final = "shuffled"

Whose = Literal["none", "own", "wrong-user", "shuffled"]
Kind = Literal["plug", "instruction", "labels", "paper", "bridge", "lora", "retriever"]
RuleKind = Literal["classical", "user-median", "user-mean", "user-majority", "user-words", "copy"]
Part = Literal["both", "text", "history"]

WORDED: Final = ("copy", "user-words")
"""Rules that answer in words of the sample, so many as their name says, and learn nothing."""


@dataclass(frozen=True)
class Retrieval:
    """Which texts of a history stand in the prompt.

    Attributes:
        method: one of `RETRIEVERS`.
        items: how many, the best first.
    """

    method: str
    items: int

    @property
    def name(self) -> str:
        """As rows write it."""
        return f"{self.method}:{self.items}"


@dataclass(frozen=True)
class Trained:
    """What is trained once per seed, for all users; several rows may share it.

    Attributes:
        name: as folders and messages write it.
        kind: plug (soft tokens from a history), instruction (the same number without one), labels (the same, where of
            a history its labels alone are counted), paper (the paper's plug), bridge (a plug for the model with the
            task's matrices in it), lora, retriever.
        retrieval: what stands in the prompts that it is trained on.
    """

    name: str
    kind: Kind
    retrieval: Retrieval | None = None

    @property
    def soft(self) -> bool:
        """Whether it makes soft tokens."""
        return self.kind in ("plug", "instruction", "labels", "paper", "bridge")

    @property
    def in_matrices(self) -> bool:
        """Whether the model carries the task's matrices when it answers."""
        return self.kind in ("lora", "bridge")

    def plug(self, own: PlugConfig) -> PlugConfig:
        """How its plug is built in a run whose own one is built as `own`."""
        if self.kind in ("instruction", "labels"):
            prior = "own" if self.kind == "labels" else "none"
            return replace(own, instruction_tokens=own.soft_tokens, persona_tokens=0, label_prior=prior)
        # Where it stands and how long histories may be is not what makes it the paper's.
        return replace(PAPER, placement=own.placement, max_history=own.max_history) if self.kind == "paper" else own


@dataclass(frozen=True)
class Rule:
    """What answers in the language model's place.

    Attributes:
        kind: classical (a regression), user-median, user-mean, user-majority, user-words (of the user's own answers) or
            copy (of the query).
        part: what a regression is told of a sample: its text, its history or both.
        words: how many there are in an answer of user-words or copy; 0 = all of a query as it is.
    """

    kind: RuleKind
    part: Part = "both"
    words: int = 0

    @property
    def fitted(self) -> bool:
        """Whether it learns something from the training split, if only what to say of a user without answers."""
        return self.kind not in WORDED


PLUG = Trained("plug", "plug")
INSTRUCTION = Trained("instruction-only", "instruction")
COUNTED = Trained("instruction+labels", "labels")
PAPERS = Trained("paper-plug", "paper")
LORA = Trained("lora", "lora")
BRIDGE = Trained("plug+lora", "bridge")
ROPG = Trained("ropg", "retriever")


@dataclass(frozen=True)
class Condition:
    """One row.

    Attributes:
        name: as written on the command line and in results.
        guards: the claim that this row tests.
        trained: what makes its soft tokens or its matrices; None = the bare language model.
        history: whose items it sees.
        persona: what the plug makes of them: their persona; that of as many random vectors; the mean persona of all
            samples; what the plug gives users without items.
        retrieval: which of the items' texts stand in the prompt.
        profile: whether a profile of the user does.
        per_user: whether every user has matrices of their own.
        rule: what answers in the language model's place; None = the model answers.
        phrases: whether the phrases of the user's own answers are mixed into what the model says.
    """

    name: str
    guards: str
    trained: Trained | None = None
    history: Whose = "none"
    persona: Literal["own", "random-vectors", "mean", "population"] = "own"
    retrieval: Retrieval | None = None
    profile: bool = False
    per_user: bool = False
    rule: Rule | None = None
    phrases: bool = False

    @property
    def needs(self) -> tuple[Trained, ...]:
        """What must be trained before this row can be filled, in order."""
        ranked = (ROPG,) if self.retrieval and self.retrieval.method == "ropg" else ()
        carried = (LORA,) if self.trained == BRIDGE else ()
        return ranked + carried + ((self.trained,) if self.trained else ())

    @property
    def seeded(self) -> bool:
        """Whether it is answered once per seed: something is trained for it, or its items are drawn."""
        return bool(self.needs) or (self.retrieval is not None and self.retrieval.method == "random")

    @property
    def in_words(self) -> bool:
        """Whether texts of a history stand in its prompts."""
        return self.retrieval is not None or self.profile


Family = Literal["none", "plug", "prompt", "weights", "no-lm"]


@dataclass(frozen=True)
class MethodInfo:
    """What tables and tests need to know of a row; travels with its trials and results, so that neither parses names.

    Attributes:
        name: as written on the command line and in results.
        family: what personalizes: nothing (`none`), a plug, texts in the `prompt`, `weights` of the model; `no-lm` for
            a row without a language model.
        history: whose history the row sees.
        control_of: the row whose claim this row tests; None for a row that is no control.
        parents: the rows that this row adds something to.
        is_seeded: whether it is trained or drawn once for each seed.
    """

    name: str
    family: Family = "none"
    history: Whose = "none"
    control_of: str | None = None
    parents: tuple[str, ...] = ()
    is_seeded: bool = False

    @property
    def is_control(self) -> bool:
        """Whether the row tests a claim about another row."""
        return self.control_of is not None

    @property
    def is_personal_gain_of(self) -> str | None:
        """The row whose personal gain is its distance from this row."""
        return self.control_of if self.history == WRONG_USER else None


_OF_OWN_ANSWERS: dict[RuleKind, str] = {
    "user-median": "median",
    "user-mean": "mean",
    "user-majority": "most frequent",
}
_GAIN = "how much of {}'s gain a stranger's history gives too; the distance to it is the personal gain"

CONDITIONS: dict[str, Condition] = {
    condition.name: condition
    for condition in (
        Condition("plain", "what the frozen model does untouched"),
        Condition(
            "instruction-only",
            "how much any trained tokens gain: same data, steps and number of tokens, no history",
            INSTRUCTION,
        ),
        Condition(WRONG_USER, _GAIN.format("the plug"), PLUG, WRONG_USER),
        Condition(SHUFFLED, "whether the order of the user's own items matters", PLUG, SHUFFLED),
        Condition("plug", "what the user's own history gives through the plug", PLUG, "own"),
        Condition(
            "random-vectors",
            "whether the persona carries anything of the items, or only their number",
            PLUG,
            "own",
            persona="random-vectors",
        ),
        Condition("mean-persona", "whether one persona for everybody does as well", PLUG, "own", persona="mean"),
        Condition(
            "population-persona",
            "what the plug does for a user without any history",
            PLUG,
            "none",
            persona="population",
        ),
        Condition(
            "instruction+labels",
            "whether counting the user's own labels, beside tokens that know of nobody, does as well as a persona",
            COUNTED,
            "own",
        ),
        Condition(
            "paper-plug",
            "what the paper's plug (PPlug, eq. 1 to 5) makes of the same history at the same place in the prompt",
            PAPERS,
            "own",
        ),
        Condition("profile", "whether a profile in words does as well", None, "own", profile=True),
        Condition(
            "lora",
            "how much matrices trained on everybody's questions gain: the task, learned with more parameters",
            LORA,
        ),
        Condition(
            "plug+lora",
            "what a persona adds where the model itself may be trained for the task, and what both do together",
            BRIDGE,
            "own",
        ),
        Condition("lora-per-user", "whether training for each user does better", LORA, "own", per_user=True),
        Condition(
            "classical",
            "whether a regression on words and history, which needs no language model, does as well",
            history="own",
            rule=Rule("classical"),
        ),
        Condition("classical:text", "what a regression learns of the task alone", rule=Rule("classical", "text")),
        Condition(
            "classical:history",
            "what a regression makes of the history without reading the question",
            history="own",
            rule=Rule("classical", "history"),
        ),
        *(
            Condition(
                kind, f"whether the {what} of the user's own answers does as well", history="own", rule=Rule(kind)
            )
            for kind, what in _OF_OWN_ANSWERS.items()
        ),
        Condition(
            "user-words",
            "whether the words that most of the user's own texts hold do as well, in no sentence",
            history="own",
            rule=Rule("user-words", words=8),
        ),
        Condition("copy", "whether repeating the question does as well", rule=Rule("copy")),
    )
}
_PHRASES = "phrases"
DEFAULT = ("plain", "instruction-only", WRONG_USER, SHUFFLED, "plug")


def parse_conditions(text: str) -> list[Condition]:
    """Conditions from a comma-separated list.

    Raises:
        ConfigError: for an unknown, repeated or missing name.
    """
    conditions = [condition_of(name.strip()) for name in text.split(",") if name.strip()]
    if not conditions or len({condition.name for condition in conditions}) < len(conditions):
        raise ConfigError(
            f"Conditions are different rows, comma-separated, such as {','.join(DEFAULT)}; found {text!r}."
        )
    return conditions


def condition_of(name: str) -> Condition:
    """The row of a name.

    Raises:
        ConfigError: if there is no such row.
    """
    if name in CONDITIONS:
        return CONDITIONS[name]
    body, at, control = name.partition("@")
    if at:
        return _control(name, body, control)
    kind, colon, count = body.partition(":")
    if colon and kind in WORDED:
        return _worded(name, kind, count)
    base, plus, retrieval = body.rpartition("+")
    if plus and retrieval == _PHRASES:
        return _with_phrases(name, base)
    return _with_retrieval(name, base, _retrieval(name, retrieval), joined=bool(plus))


def find_condition(name: str) -> Condition | None:
    """The row of a name; None for what is known of the data itself, such as the all-knowing predictor."""
    try:
        return condition_of(name)
    except ConfigError:
        return None


def control_of(name: str) -> str | None:
    """The wrong-user row of a personal row; None for a row that is not personal."""
    if name == "plug":
        return WRONG_USER
    condition = find_condition(name)
    personal = condition is not None and condition.history == "own" and condition.persona == "own"
    return f"{name}@{WRONG_USER}" if personal else None


def is_control(name: str) -> bool:
    """Whether a row is there to test a claim about another row."""
    condition = find_condition(name)
    return condition is not None and (condition.history in (WRONG_USER, SHUFFLED) or condition.persona != "own")


def is_rule(name: str) -> bool:
    """Whether a row is answered without the language model."""
    condition = find_condition(name)
    return condition is not None and condition.rule is not None


def needed(conditions: Sequence[Condition]) -> list[Trained]:
    """What has to be trained for these rows, each once, in order."""
    return list(dict.fromkeys(trained for condition in conditions for trained in condition.needs))


def _control(name: str, body: str, control: str) -> Condition:
    base = condition_of(body)
    ordered = control == SHUFFLED and not base.per_user  # a user's matrices know no order
    personal = base.history == "own" and base.persona == "own"
    if not personal or not (control == WRONG_USER or ordered):
        raise ConfigError(
            f"A control is written ROW@wrong-user or ROW@shuffled, with a row that uses the user's own history (for "
            f"shuffled: in its order); found {name!r}."
        )
    if body == "plug":
        return CONDITIONS[control]
    guards = _GAIN.format(body) if control == WRONG_USER else f"whether the order of the items matters to {body}"
    return replace(base, name=name, guards=guards, history=control)  # type: ignore[arg-type]


def _worded(name: str, kind: str, count: str) -> Condition:
    base = CONDITIONS[kind]
    if not _is_count(count) or base.rule is None:
        raise _unknown(name)
    return replace(base, name=name, rule=replace(base.rule, words=int(count)))


def _retrieval(name: str, text: str) -> Retrieval:
    method, _, count = text.partition(":")
    if method not in RETRIEVERS or not _is_count(count):
        raise _unknown(name)
    return Retrieval(method, int(count))


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) >= 1


def _unknown(name: str) -> ConfigError:
    retrieved = [*(f"{retriever}:4" for retriever in RETRIEVERS), "instruction+bm25:4", "plug+bm25:1", "profile+bm25:4"]
    known = [*CONDITIONS, *retrieved, "copy:10", "user-words:4", "plug+phrases"]
    return ConfigError(f"There is no row {name!r}; {nearest(name, known)}")


def _with_phrases(name: str, base: str) -> Condition:
    shown = CONDITIONS["instruction-only"] if base == "instruction" else condition_of(base)
    if base == "instruction-only":
        raise ConfigError(f"{name} is written instruction+phrases.")
    if shown.rule or shown.per_user or shown.persona != "own" or shown.phrases or is_control(shown.name):
        raise ConfigError(
            f"Phrases are mixed into what the frozen model says beside the user's own history (plug+phrases, "
            f"instruction+phrases, plug+bm25:1+phrases; a control is plug+phrases@wrong-user); found {name!r}."
        )
    guards = f"what the phrases of the user's own answers, mixed into what the model says, add to {shown.name}"
    return replace(shown, name=name, guards=guards, history="own", phrases=True)


def _with_retrieval(name: str, base: str, retrieval: Retrieval, *, joined: bool) -> Condition:
    if not joined:
        return Condition(name, "what the texts themselves do in the prompt", None, "own", retrieval=retrieval)
    if base == "profile":
        return replace(CONDITIONS["profile"], name=name, retrieval=retrieval)
    if base == "instruction":
        guards = "what the texts do once retrieval has seen the same training data as the plug"
        return Condition(name, guards, Trained(name, "instruction", retrieval), "own", retrieval=retrieval)
    if base == "plug":
        guards = "whether persona and texts complete each other, trained together"
        return Condition(name, guards, Trained(name, "plug", retrieval), "own", retrieval=retrieval)
    raise ConfigError(f"Retrieval goes with instruction, plug or profile (plug+bm25:1); found {name!r}.")
