"""The rows of this package, by name.

    plain  instruction-only  plug  paper-plug                the bare model, the task alone, the method
    bm25:4  recency:4  dense:4  random:4  ropg:4             the best 4 items of the history, written into the prompt
    instruction+bm25:4  plug+bm25:1  profile+bm25:4          soft tokens trained on such prompts; a profile before them
    plug+copy-head  instruction+copy-head    with tokens copied from the prompt and from the user's past answers
    instruction+labels                                       soft tokens, and counts of the user's own labels
    instruction+neighbors                                    the same, and labels of the user's similar items
    profile                                                  a description of the user that the model wrote
    stated  stated+bm25:4                                    the user's stated preferences in the system message
    lora  lora-per-user                                      a LoRA in the model: the task's; each user's on top of it
    classical  classical:text  classical:history             a regression on words and history, on one of them
    user-median  user-mean  user-majority                    a statistic of the user's past answers
    copy  copy:10  user-words:8                              the query, its first words, the user's frequent words
    reference                                                the right answers: the ceiling of measures of texts
    ROW@wrong-user  ROW@shuffled                             controls: another user's history, or another item order
    wrong-user  shuffled                                     short for plug@wrong-user and plug@shuffled
    random-vectors  mean-persona  population-persona         further controls of the plug
    plug:text  plug:picture  plug:vector                     one part of the items alone
    noise-pictures  wrong-pictures                           pictures of noise, or a stranger's, beside the own texts

The personal gain of a row is its distance from its wrong-user control. Rows without a language model show which scores
are possible without one.
"""

from __future__ import annotations

from dataclasses import replace

from personaplug.analysis.method_info import HistorySource, MethodInfo
from personaplug.baselines.heuristics import CopyQuery, UserMajority, UserRating, UserWords, user_mean, user_median
from personaplug.baselines.no_lm import Baseline
from personaplug.baselines.prompt_builder import RETRIEVERS, SEEDED_RETRIEVERS
from personaplug.baselines.regression import Regression
from personaplug.baselines.retrievers import Retrieval
from personaplug.errors import ConfigError
from personaplug.methods.base import Method
from personaplug.methods.language_model import (
    LanguageModelMethod,
    MeanPersonaMethod,
    NoisePicturesMethod,
    RandomVectorsMethod,
    StrangersPicturesMethod,
)
from personaplug.methods.lora import LoraMethod, UserLoraMethod
from personaplug.methods.no_lm import BaselineMethod
from personaplug.methods.prompt_texts import PromptTexts
from personaplug.methods.reference import ReferenceMethod
from personaplug.methods.registry import (
    MethodFactory,
    find_method,
    number_after,
    register_extension,
    register_method,
    unknown_method,
)
from personaplug.training.copy_head_part import COPY_HEAD, INSTRUCTION_COPY_HEAD
from personaplug.training.parts import INSTRUCTION, LABEL_COUNTS, NEIGHBORS, ONE_PART_PLUGS, PAPER_PLUG, PLUG

_USER_WORDS = 8
_INSTRUCTION = "instruction"  # the base of `instruction+bm25:4`; the row without extensions is `instruction-only`
_TEXTS = {"": PromptTexts(), "profile": PromptTexts(profile=True), "stated": PromptTexts(stated=True)}


def _fixed(method: Method) -> MethodFactory:
    """Return the factory of a row whose name takes no number."""

    def factory(argument: str) -> Method:
        if argument:
            raise unknown_method(f"{method.name}:{argument}")
        return method

    return factory


def _register_retriever(retriever: str) -> None:
    def extend(name: str, base: str, argument: str) -> Method:
        return _retrieval_row(name, base, Retrieval(retriever, number_after(name, argument)))

    register_extension(retriever, extend, examples=(f"{retriever}:4", f"{_INSTRUCTION}+{retriever}:4"))


def _retrieval_row(name: str, base: str, retrieval: Retrieval) -> Method:
    """Return the row with retrieved texts in the prompt, alone or beside a base."""
    info = MethodInfo(name, "prompt", "own", parents=(retrieval.name,), is_seeded=True)
    if base == _INSTRUCTION:
        return LanguageModelMethod(
            replace(INSTRUCTION, name=name, retrieval=retrieval),
            PromptTexts(retrieval),
            info=info,
            rationale="how much retrieved texts gain beside soft tokens that are trained on the same data as the plug",
        )
    if base == "plug":
        parents = (retrieval.name, f"{_INSTRUCTION}+{retrieval.name}", "plug")
        return LanguageModelMethod(
            replace(PLUG, name=name, retrieval=retrieval),
            PromptTexts(retrieval),
            info=replace(info, family="plug", parents=parents),
            rationale="whether a persona and retrieved texts complement each other if they are trained together",
        )
    if base not in _TEXTS:
        raise ConfigError(
            f"Retrieval must follow instruction, plug, profile or stated, as in plug+bm25:1; found {name!r}."
        )
    dense = (f"dense:{retrieval.items}",) if retrieval.method == "ropg" else ()
    base_parents = {"": dense, "profile": (retrieval.name,), "stated": (retrieval.name, "stated")}
    return LanguageModelMethod(
        texts=replace(_TEXTS[base], retrieval=retrieval),
        info=replace(info, parents=base_parents[base], is_seeded=retrieval.method in SEEDED_RETRIEVERS),
        rationale="how much retrieved texts in the prompt gain",
    )


def _with_copy_head(name: str, base: str, argument: str) -> Method:
    parts = {"plug": COPY_HEAD, _INSTRUCTION: INSTRUCTION_COPY_HEAD}
    if base not in parts or argument:
        raise ConfigError(
            f"+copy-head must follow plug or {_INSTRUCTION}, as in plug+copy-head; a control ends with it: "
            f"plug+copy-head@wrong-user. Found {name!r}."
        )
    method = find_method("instruction-only" if base == _INSTRUCTION else base)
    assert isinstance(method, LanguageModelMethod)
    parents = (method.name, *((f"{_INSTRUCTION}+copy-head",) if base == "plug" else ()))
    return replace(
        method,
        info=replace(method.info, name=name, family="plug", history="own", parents=parents),
        rationale=f"how much copied tokens of the prompt and of the user's past answers add to {method.name}",
        copy_head=parts[base],
    )


def _no_lm(
    baseline: Baseline,
    rationale: str,
    *,
    name: str = "",
    history: HistorySource = "own",
    parents: tuple[str, ...] = (),
) -> Method:
    info = MethodInfo(name or baseline.name, "no-lm", history, parents=parents)
    return BaselineMethod(baseline, info=info, rationale=rationale)


def _copy(argument: str) -> Method:
    name = f"copy:{argument}" if argument else "copy"
    words = number_after(name, argument) if argument else 0
    rationale = "whether a copy of the question does as well"
    return _no_lm(CopyQuery("copy", words), rationale, name=name, history="none")


def _user_words(argument: str) -> Method:
    name = f"user-words:{argument}" if argument else "user-words"
    words = number_after(name, argument) if argument else _USER_WORDS
    rationale = "whether a list of the user's most frequent words does as well"
    return _no_lm(UserWords("user-words", words), rationale, name=name)


_PLUG = LanguageModelMethod(
    PLUG,
    info=MethodInfo("plug", "plug", "own", is_seeded=True),
    rationale="how much the user's own history gains through the plug",
)
_FIXED: tuple[Method, ...] = (
    LanguageModelMethod(info=MethodInfo("plain"), rationale="what the frozen model does without personalization"),
    LanguageModelMethod(
        INSTRUCTION,
        info=MethodInfo("instruction-only", is_seeded=True),
        rationale="how much soft tokens gain without a history, with the same data, steps and number of tokens",
    ),
    LanguageModelMethod(
        PAPER_PLUG,
        info=MethodInfo("paper-plug", "plug", "own", is_seeded=True),
        rationale="how much the plug of the paper (PPlug, eq. 1 to 5) gains with the same history and placement",
    ),
    LanguageModelMethod(
        LABEL_COUNTS,
        info=MethodInfo("instruction+labels", "counts", "own", is_seeded=True),
        rationale="whether counts of the user's past labels, beside tokens without a history, do as well as a persona",
    ),
    LanguageModelMethod(
        NEIGHBORS,
        info=MethodInfo("instruction+neighbors", "counts", "own", is_seeded=True),
        rationale="whether the labels of similar past questions, beside tokens without a history, do as well",
    ),
    RandomVectorsMethod(
        PLUG,
        info=MethodInfo("random-vectors", "plug", "own", control_of="plug", is_seeded=True),
        rationale="whether the persona depends on the items, or only on their number",
    ),
    NoisePicturesMethod(
        PLUG,
        info=MethodInfo("noise-pictures", "plug", "own", control_of="plug", is_seeded=True),
        rationale="how much of the plug's gain pictures of noise give too",
    ),
    StrangersPicturesMethod(
        PLUG,
        info=MethodInfo("wrong-pictures", "plug", "own", control_of="plug", is_seeded=True),
        rationale="how much of the plug's gain a stranger's pictures give too, beside the user's own texts",
    ),
    MeanPersonaMethod(
        PLUG,
        info=MethodInfo("mean-persona", "plug", "own", control_of="plug", is_seeded=True),
        rationale="whether one persona for all users does as well",
    ),
    LanguageModelMethod(
        PLUG,
        info=MethodInfo("population-persona", "plug", control_of="plug", is_seeded=True),
        rationale="how much the plug gains for a user without a history",
    ),
    LanguageModelMethod(
        texts=_TEXTS["profile"],
        info=MethodInfo("profile", "prompt", "own"),
        rationale="whether a profile in words does as well",
    ),
    LanguageModelMethod(
        texts=_TEXTS["stated"],
        info=MethodInfo("stated", "prompt", "own"),
        rationale="how much the user's stated preferences gain as text in the system message",
    ),
    LoraMethod(
        info=MethodInfo("lora", "weights", is_seeded=True),
        rationale="how much the task alone gains with more trained parameters",
    ),
    UserLoraMethod(
        info=MethodInfo("lora-per-user", "weights", "own", parents=("lora",), is_seeded=True),
        rationale="whether a LoRA for each user does better",
    ),
    _no_lm(
        Regression(),
        "whether a regression on words and history, which needs no language model, does as well",
        parents=("classical:text", "classical:history"),
    ),
    _no_lm(Regression("text"), "what a regression predicts from the question alone", history="none"),
    _no_lm(Regression("history"), "what a regression predicts from the history alone"),
    _no_lm(UserRating("user-median", user_median), "whether the median of the user's past answers does as well"),
    _no_lm(UserRating("user-mean", user_mean), "whether the mean of the user's past answers does as well"),
    _no_lm(UserMajority(), "whether the most frequent of the user's past answers does as well"),
    ReferenceMethod(
        info=MethodInfo("reference", "oracle", "own"),
        rationale="the score of the right answers: the ceiling of every measure of texts",
    ),
)

_ONE_PART = {
    part.item_part: LanguageModelMethod(
        part,
        info=MethodInfo(part.name, "plug", "own", is_seeded=True),
        rationale=f"how much a plug gains that is trained on one part of the items alone: the {part.item_part}",
    )
    for part in ONE_PART_PLUGS
}


def _plug(argument: str) -> Method:
    """Return the plug, or a plug that reads one part of the items: `plug:picture`."""
    if argument and argument not in _ONE_PART:
        raise unknown_method(f"plug:{argument}")
    return _ONE_PART[argument] if argument else _PLUG


for _method in _FIXED:
    register_method(_method.name, _fixed(_method))
register_method("plug", _plug)
register_method("copy", _copy)
register_method("user-words", _user_words)
for _retriever in RETRIEVERS:
    _register_retriever(_retriever)
register_extension("copy-head", _with_copy_head, examples=("plug+copy-head", "instruction+copy-head"))
