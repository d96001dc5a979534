"""Prompts with history texts: LaMP's wordings, token budgets, counts of dropped and shortened texts."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from families import small_llm

from personaplug.baselines.history_prompt import HistoryPrompt, HistoryPromptFormatter
from personaplug.data import LAMP_TASKS
from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.data.task_registry import parse_task
from personaplug.llm.base import LanguageModel
from personaplug.llm.prompt_tokenizer import PromptTokenizer
from personaplug.llm.tiny import load_tiny_llm

REFERENCE = (
    'For an author who has written the paper with the title "X and title", which reference is related? Just answer '
    'with [1] or [2] without explanation. [1]: "A" [2]: "B"'
)
MOVIES = Task("Movies", "label", ("description", "tag"), "tag", ("accuracy",), ("a", "b"))
PLAIN = Task("Plain", "text", ("text",), None, ("rouge_1",), item_template="<{text}>")


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return load_tiny_llm(max_prompt_tokens=4096)


def item(task: Task, *values: str) -> HistoryItem:
    return HistoryItem("i", tuple(zip(task.field_names, values, strict=True)), task.answer_field)


def text(prompt: HistoryPrompt) -> str:
    assert isinstance(prompt.prompt, str)
    return prompt.prompt


def small(room: int) -> LanguageModel:
    """Return a model whose tokens are bytes, with room for `room` of them in a prompt."""
    llm: Any = load_tiny_llm(max_prompt_tokens=room + 1)
    assert llm.max_text_tokens == room
    return llm  # type: ignore[no-any-return]


# ---- wordings


@pytest.mark.parametrize(
    ("name", "values", "prompt", "expected"),
    [
        (
            "LaMP_1", [("a", "x"), ("b", "y")], REFERENCE,
            REFERENCE.replace('with the title "X', 'with the title, and "a", and "b" "X'),
        ),
        (
            "LaMP_2", [("a film", "comedy"), ("b", "true story")], "Which tag? description: d",
            'the tag for the movie: "a film" is "comedy", and the tag for the movie: "b" is "true story". '
            "Which tag? description: d",
        ),
        (
            "LaMP_3", [("good", "5"), ("bad", "1")], "What is the score? review: r",
            '5 is the score for "good", and 1 is the score for "bad". What is the score? review: r',
        ),
        (
            "LaMP_4", [("T", "long"), ("U", "")], "Generate a headline for: a",
            '"T" is the title for "long", and "U" is the title for "". Generate a headline for: a',
        ),
        (
            "LaMP_5", [("T", "abs"), ("U", "")], "Generate a title for the following abstract of a paper: a",
            '"T" is a title for "abs", and "U" is a title for "". Following the given patterns Generate a title for '
            "the following abstract of a paper: a",
        ),
        (
            "LaMP_7", [("hi",), ("yo",)], "Paraphrase the following tweet: t",
            '"hi", and "yo" are written by a person. Following the given patterns Paraphrase the following tweet: t',
        ),
    ],
)  # fmt: skip
def test_format_uses_lamps_wording(
    llm: LanguageModel, name: str, values: list[tuple[str, ...]], prompt: str, expected: str
) -> None:
    task = LAMP_TASKS[name]
    written = HistoryPromptFormatter(task, llm).format(prompt, [item(task, *each) for each in values])
    assert written.prompt == expected
    assert (written.offered, written.included, written.shortened) == (2, 2, 0)
    if name == "LaMP_1":
        assert written.soft_at == 0
    else:
        assert text(written)[written.soft_at :] == prompt


def test_format_uses_the_text_of_an_item_without_a_template(llm: LanguageModel) -> None:
    items = [item(MOVIES, "d {tag}", "comedy"), item(MOVIES, "", "a")]
    written = HistoryPromptFormatter(MOVIES, llm).format("Q", items)
    assert written.prompt == f"{items[0].text}, and {items[1].text}. Q"


def test_format_puts_items_first_if_the_input_lacks_the_marker(llm: LanguageModel) -> None:
    task = LAMP_TASKS["LaMP_1"]
    written = HistoryPromptFormatter(task, llm).format("Which one?", [item(task, "a", "x")])
    assert (written.prompt, written.soft_at) == ('"a". Which one?', 5)


def test_format_uses_the_tasks_joint_and_template(llm: LanguageModel) -> None:
    around = replace(PLAIN, history_template="{input}input{history}!", item_joint=" | ")
    written = HistoryPromptFormatter(around, llm).format("Q", [item(PLAIN, "a"), item(PLAIN, "b")])
    assert (written.prompt, written.soft_at) == ("Qinput<a> | <b>!", 0)
    behind = replace(PLAIN, history_template="input{history}input{input}.")
    written = HistoryPromptFormatter(behind, llm).format("Q", [item(PLAIN, "a")])
    assert (written.prompt, written.soft_at) == ("input<a>inputQ.", len("input<a>input"))


def test_format_never_parses_users_texts_as_templates(llm: LanguageModel) -> None:
    nasty = '{history} {input} {text} {0} {} "{{"\\1 %s'
    task = LAMP_TASKS["LaMP_4"]
    written = HistoryPromptFormatter(task, llm).format(nasty, [item(task, nasty, nasty)])
    assert written.prompt == f'"{nasty}" is the title for "{nasty}". {nasty}'
    assert text(written)[written.soft_at :] == nasty
    noted = HistoryPromptFormatter(task, llm).add_note(nasty, nasty)
    assert noted.prompt == f"About this user: {nasty}. {nasty}"


def test_format_without_items_changes_nothing(llm: LanguageModel) -> None:
    for task in LAMP_TASKS.values():
        assert HistoryPromptFormatter(task, llm).format(REFERENCE, []) == HistoryPrompt(REFERENCE, 0, 0, 0, 0)


def test_history_prompt_repr_hides_users_texts(llm: LanguageModel) -> None:
    assert "secret" not in repr(HistoryPromptFormatter(PLAIN, llm).format("secret", [item(PLAIN, "secret")]))


# ---- budgets


def test_format_divides_the_room_between_items() -> None:
    # "Q" and ". " leave 60 bytes; 12 are joints and 6 angle brackets: 42 of content.
    items = [item(PLAIN, "a" * 50), item(PLAIN, "b" * 9), item(PLAIN, "c" * 50)]
    written = HistoryPromptFormatter(PLAIN, small(63)).format("Q", items)
    assert written.prompt == f"<{'a' * 17}>, and <{'b' * 9}>, and <{'c' * 16}>. Q"
    assert (written.offered, written.included, written.shortened) == (3, 3, 2)


def test_format_drops_the_last_items_if_shares_are_too_small() -> None:
    items = [item(PLAIN, letter * 50) for letter in "abcd"]
    written = HistoryPromptFormatter(PLAIN, small(43)).format("Q", items)
    assert written.prompt == f"<{'a' * 15}>, and <{'b' * 15}>. Q"
    assert (written.offered, written.included, written.shortened) == (4, 2, 2)


def test_format_never_cuts_answers() -> None:
    task = LAMP_TASKS["LaMP_4"]
    items = [item(task, "The whole title", "some article " * 20)]
    written = HistoryPromptFormatter(task, small(70)).format("Q", items)
    start, end = '"The whole title" is the title for "', '". Q'
    assert text(written).startswith(start + "some article")
    assert text(written).endswith(end)
    assert len(text(written)) in (69, 70)  # a cut may also remove a blank at the end
    assert HistoryPromptFormatter(task, small(40)).format("Q", items) == HistoryPrompt("Q", 0, 1, 0, 0)


def test_format_skips_an_item_that_never_fits() -> None:
    task = LAMP_TASKS["LaMP_4"]
    items = [item(task, "t" * 200, "x"), item(task, "short", "y")]
    written = HistoryPromptFormatter(task, small(60)).format("Q", items)
    assert written.prompt == '"short" is the title for "y". Q'
    assert (written.offered, written.included, written.shortened) == (2, 1, 0)


def test_format_shortens_an_item_that_is_only_an_answer() -> None:
    task = LAMP_TASKS["LaMP_7"]
    written = HistoryPromptFormatter(task, small(80)).format("Q", [item(task, "z" * 99)])
    assert text(written).startswith('"zzzzzzzz')
    assert (len(text(written)), written.shortened) == (80, 1)


def test_format_shortens_two_contents_equally() -> None:
    task = Task("News", "label", ("title", "text", "category"), "category", ("f1",), ("a", "b"))
    written = HistoryPromptFormatter(task, small(60)).format("Q", [item(task, "t" * 90, "x" * 90, "a")])
    assert written.prompt == f"title: {'t' * 16} text: {'x' * 15} category: a. Q"


@pytest.mark.parametrize("word", ["", "title"])
def test_format_changes_nothing_without_room(word: str) -> None:
    task = replace(PLAIN, history_after=word)
    long = "title " + "q" * 50
    for room in (20, 56, 60):  # shorter than the input, just its length, a little longer
        assert HistoryPromptFormatter(task, small(room)).format(long, [item(PLAIN, "a" * 30)]) == HistoryPrompt(
            long, 0, 1, 0, 0
        )


class _NonAdditiveCounts:
    """A stand-in with tokens of four characters; a whole text may have more tokens than its parts."""

    max_text_tokens = 40

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) // 4 + 2 * text.count(", and ") for text in texts]

    def count_prompt_tokens(self, text: str, soft_at: int = 0) -> int:
        return sum(self.count_tokens([text[:soft_at], text[soft_at:]]))

    def cut_text(self, text: str, tokens: int) -> str:
        return text[: 4 * tokens].rstrip()


def test_format_shrinks_until_the_whole_prompt_fits() -> None:
    model: Any = _NonAdditiveCounts()
    written = HistoryPromptFormatter(PLAIN, model).format("Q", [item(PLAIN, letter * 100) for letter in "abc"])
    assert written.included >= 1
    assert model.count_tokens([written.prompt])[0] <= 40


def _drawn_text(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice("ab é🙂{}\"' \n") for _ in range(rng.randrange(longest)))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_2", "LaMP_5", "LaMP_7", "Movies"])
def test_format_keeps_the_whole_input_of_random_prompts(name: str, seed: int) -> None:
    rng = random.Random(seed)
    task = LAMP_TASKS.get(name, MOVIES)
    total_included = 0
    llm = small(rng.randrange(20, 400))
    room = llm.max_text_tokens
    for _ in range(40):
        limit = rng.choice([0, 0, rng.randrange(1, 200)])
        prompt = rng.choice(["", "with the title"]) + _drawn_text(rng, 100)
        items = [item(task, *(_drawn_text(rng, 80) for _ in task.field_names)) for _ in range(rng.randrange(6))]
        written = HistoryPromptFormatter(task, llm, history_tokens=limit).format(prompt, items)
        total_included += written.included
        assert written.offered == len(items)
        assert 0 <= written.shortened <= written.included <= len(items)
        if not written.included:
            assert (written.prompt, written.soft_at) == (prompt, 0)
            continue
        assert llm.count_tokens([text(written)])[0] <= room
        assert not llm.measure([written.prompt])[0].truncated
        inserted = task.history_after and task.history_after in prompt
        if not inserted:
            assert text(written)[written.soft_at :] == prompt
        else:
            head, tail = prompt[: prompt.index("title") + 5], prompt[prompt.index("title") + 5 :]
            assert written.soft_at == 0
            assert text(written).startswith(head + ", and ")
            assert text(written).endswith(tail)
        added = llm.count_tokens([text(written)])[0] - llm.count_tokens([prompt])[0]
        frame = len(", and ") if inserted else len(task.history_template) - len("{history}{input}")
        assert not limit or added - frame <= limit
    assert total_included > 0 or room < 80


class _WordTokenizerModel:
    """A stand-in whose tokenizer changes pieces where texts are joined, as T5 does."""

    def __init__(self, room: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        trained = Tokenizer(models.Unigram())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trained.decoder = decoders.Metaspace()
        texts = [f"{task.item_template} {task.history_template} the title of this film" for task in LAMP_TASKS.values()]
        special: Any = {
            "special_tokens": ["</s>", "<unk>"],
            "unk_token": "<unk>",
            "show_progress": False,
            "initial_alphabet": list(string.printable.strip()),
        }
        trained.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=180, **special))
        kind: Any = PreTrainedTokenizerFast
        tokenizer = kind(tokenizer_object=trained, eos_token="</s>", unk_token="<unk>")
        self.prompt_tokenizer = PromptTokenizer(tokenizer, max_tokens=room, is_encoder_decoder=True)
        self.max_text_tokens = self.prompt_tokenizer.max_text_tokens
        self.count_tokens, self.cut_text = self.prompt_tokenizer.count_tokens, self.prompt_tokenizer.cut_text
        self.count_prompt_tokens = self.prompt_tokenizer.count_prompt_tokens


@pytest.mark.parametrize("room", [60, 150, 300])
@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_2", "LaMP_4", "LaMP_7"])
def test_format_fits_with_a_word_tokenizer(name: str, room: int) -> None:
    rng = random.Random(room)
    words = ["the", "title", "for", "this", "film", "is", "a", "tag", "pattern,", "and", "written", "by", "{x}", "żółw"]
    task, llm = LAMP_TASKS[name], _WordTokenizerModel(room)
    model: Any = llm
    formatters = [HistoryPromptFormatter(task, model), HistoryPromptFormatter(task, model, history_tokens=room // 2)]
    total_included = 0
    for _ in range(60):
        prompt = " ".join(rng.choices(words, k=rng.randrange(1, 25)))
        texts = [[" ".join(rng.choices(words, k=rng.randrange(25))) for _ in task.field_names] for _ in range(4)]
        items = [item(task, *values) for values in texts]
        for formatter in formatters:
            written = formatter.format(prompt, items)
            total_included += written.included
            if written.included:
                assert not llm.prompt_tokenizer.encode_prompt(written.prompt, written.soft_at).truncated
                assert not llm.prompt_tokenizer.encode_prompt(written.prompt).truncated
                noted = formatter.add_note(written.prompt, texts[0][0], soft_at=written.soft_at)
                assert not llm.prompt_tokenizer.encode_prompt(noted.prompt, noted.soft_at).truncated
                assert text(noted).endswith(text(written))
    assert total_included > 0


def test_format_limits_only_the_history_by_history_tokens() -> None:
    llm = small(400)
    items = [item(PLAIN, "a" * 90), item(PLAIN, "b" * 90)]
    written = HistoryPromptFormatter(PLAIN, llm, history_tokens=50).format("q" * 100, items)
    assert written.prompt == f"<{'a' * 20}>, and <{'b' * 20}>. {'q' * 100}"
    assert HistoryPromptFormatter(PLAIN, llm, history_tokens=9).format("q", items) == HistoryPrompt("q", 0, 2, 0, 0)


def test_format_fits_with_a_chat_template() -> None:
    llm = small_llm("llama", chat=True)
    written = HistoryPromptFormatter(PLAIN, llm).format("Q", [item(PLAIN, "a" * 999)])
    (measure,) = llm.measure([written.prompt])
    assert (measure.tokens, measure.truncated) == (512, False)
    row = llm.prompt_tokenizer.encode_prompt(written.prompt, written.soft_at)
    assert row.ids[row.soft_position :] == tuple(llm.prompt_tokenizer.tokenizer("Q</><bot>")["input_ids"])


# ---- notes


def test_add_note_puts_the_note_first(llm: LanguageModel) -> None:
    written = HistoryPromptFormatter(PLAIN, llm).add_note("Q?", " Likes short films. ")
    assert written == HistoryPrompt("About this user: Likes short films. Q?", 36, 1, 1, 0)
    again = HistoryPromptFormatter(PLAIN, llm).add_note("<a>. Q", "Likes films", soft_at=5)
    assert text(again)[again.soft_at :] == "Q"


@pytest.mark.parametrize("blank", ["", "  ", " . "])
def test_add_note_ignores_a_blank_note(llm: LanguageModel, blank: str) -> None:
    assert HistoryPromptFormatter(PLAIN, llm).add_note("Q", blank, soft_at=1) == HistoryPrompt("Q", 1, 0, 0, 0)


def test_add_note_cuts_or_drops_a_long_note() -> None:
    note = "Writes about films and books"
    cut = HistoryPromptFormatter(PLAIN, small(400), history_tokens=13).add_note("Q", note)
    assert cut == HistoryPrompt("About this user: Writes about. Q", 31, 1, 1, 1)
    tight = HistoryPromptFormatter(PLAIN, small(40)).add_note("Q", note)
    assert tight.prompt == "About this user: Writes about films a. Q"
    assert HistoryPromptFormatter(PLAIN, small(27)).add_note("Q", note) == HistoryPrompt("Q", 0, 1, 0, 0)
    assert HistoryPromptFormatter(PLAIN, small(27)).add_note("Q", "Short.").prompt == "About this user: Short. Q"


# ---- declared tasks


def test_format_uses_the_templates_of_a_declared_task(llm: LanguageModel) -> None:
    task = parse_task({"name": "Own", "like": "LaMP_3", "item_template": "{text}={score}", "item_joint": "; "})
    written = HistoryPromptFormatter(task, llm).format("Q", [item(task, "a", "1"), item(task, "b", "2")])
    assert written.prompt == "a=1; b=2. Q"
