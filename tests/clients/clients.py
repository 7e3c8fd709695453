"""Real clients against the OpenAI endpoint of a real daemon. OPENAI_BASE_URL, OPENAI_API_KEY and STUB say where."""

import asyncio
import json
import os
import subprocess
import sys
import time
import traceback
import urllib.request

import openai

URL, KEY = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
TWO = [{"role": "user", "content": "What is 2+2?"}]
NUMBERS = " ".join(str(n) for n in range(1, 51))


def counted(usage):
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def openai_models(client):
    names = [model.id for model in client.models.list()]
    assert {"calc", "busy", "broken", "slow", "echo"} <= set(names) and names[-1] == "echo", names
    assert client.models.retrieve("calc").owned_by == "opengateway"


def openai_whole(client):
    raw = client.chat.completions.with_raw_response.create(model="calc", messages=TWO, temperature=0, seed=1)
    answer = raw.parse()
    assert answer.choices[0].message.content == "4" and answer.choices[0].finish_reason == "stop"
    assert answer.model == "calc" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert counted(answer.usage) == (3, 1, 4), answer.usage
    assert raw.headers["x-opengateway-served-by"] == "clients" and raw.headers["x-opengateway-model"] == "calc"


def openai_conversation(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Count to 3"},
        {"role": "assistant", "content": "1 2 3"},
        {"role": "user", "content": [{"type": "text", "text": "Count to "}, {"type": "text", "text": "5"}]},
    ]
    answer = client.chat.completions.create(model="calc", messages=messages, max_completion_tokens=3, stop=["x"], top_p=0.9)
    assert answer.choices[0].message.content == "1 2 3 " and answer.choices[0].finish_reason == "length"


def openai_stream(client):
    stream = client.chat.completions.create(
        model="calc", messages=[{"role": "user", "content": "Count to 50"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1 and len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == NUMBERS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert counted(chunks[-1].usage) == (3, 50, 53) and chunks[-1].choices == []
    plain = list(client.chat.completions.create(model="calc", messages=TWO, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def openai_helper_stream(client):
    with client.chat.completions.stream(model="calc", messages=TWO) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == "4"


def openai_completions(client):
    answer = client.completions.create(model="calc", prompt="2+2=")
    assert answer.choices[0].text == "4" and answer.object == "text_completion" and counted(answer.usage) == (1, 1, 2)
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(model="calc", prompt="Count to 5", stream=True))
    assert text == "1 2 3 4 5"
    raises(openai.BadRequestError, lambda: client.completions.create(model="calc", prompt=["a", "b"]))


def openai_errors(client):
    error = raises(openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-4o", messages=TWO))
    assert error.code == "model_not_found" and error.param == "model" and "calc" in error.message, error
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(model="calc", messages=TWO, n=2))
    assert error.param == "n" and error.type == "invalid_request_error"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert raises(openai.BadRequestError, lambda: client.chat.completions.create(model="calc", messages=TWO, tools=tools)).param == "tools"
    raises(openai.BadRequestError, lambda: client.chat.completions.create(model="calc", messages=[]))
    raises(openai.NotFoundError, lambda: client.embeddings.create(model="calc", input="x"))
    raises(openai.NotFoundError, lambda: client.responses.create(model="calc", input="x"))
    raises(openai.AuthenticationError, lambda: client.with_options(api_key="og-0-nonsense").models.list())
    long = [{"role": "user", "content": "x" * (1200 * 1024)}]
    error = raises(openai.APIStatusError, lambda: client.chat.completions.create(model="calc", messages=long))
    assert error.status_code == 413, error
    once = client.with_options(max_retries=0)
    error = raises(openai.InternalServerError, lambda: once.chat.completions.create(model="broken", messages=TWO))
    assert error.status_code == 502 and error.code == "backend_failed", error


def openai_retries(client):
    # Twice 429 with Retry-After: 1, then the answer; the client waits as it is told.
    began = time.monotonic()
    answer = client.with_options(max_retries=3).chat.completions.create(model="busy", messages=TWO)
    assert answer.choices[0].message.content == "4" and time.monotonic() - began >= 1


def openai_wishes(client):
    assert client.chat.completions.create(model="calc@clients", messages=TWO).choices[0].message.content == "4"
    headers = {"X-OpenGateway-Node": "clients", "X-OpenGateway-Timeout": "5"}
    assert client.chat.completions.create(model="calc", messages=TWO, extra_headers=headers).choices[0].message.content == "4"
    raises(openai.NotFoundError, lambda: client.chat.completions.create(model="calc@nobody", messages=TWO))


def openai_leaves(client):
    stream = client.chat.completions.create(model="slow", messages=[{"role": "user", "content": "Count to 1000"}], stream=True)
    for _, chunk in zip(range(3), stream):
        assert chunk.choices
    stream.close()
    deadline = time.monotonic() + 2
    while not json.load(urllib.request.urlopen(os.environ["STUB"] + "/gone"))["gone"]:
        assert time.monotonic() < deadline, "the upstream still generates"
        time.sleep(0.02)


def openai_async(_):
    async def run():
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as client:
            async def one(n):
                answer = await client.chat.completions.create(model="calc", messages=[{"role": "user", "content": f"Count to {n}"}])
                assert answer.choices[0].message.content == " ".join(str(i) for i in range(1, n + 1))

            await asyncio.gather(*(one(n) for n in range(1, 33)))
            stream = await client.chat.completions.create(model="calc", messages=TWO, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "4"

    asyncio.run(run())


def litellm_client(_):
    import litellm

    litellm.suppress_debug_info = True
    # What its tables say of prices and tokens comes from the network otherwise.
    common = {"model": "openai/calc", "messages": TWO, "api_base": URL, "api_key": KEY}
    answer = litellm.completion(**common)
    assert answer.choices[0].message.content == "4" and counted(answer.usage) == (3, 1, 4)
    chunks = list(litellm.completion(**common, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "4"
    raises(litellm.AuthenticationError, lambda: litellm.completion(**{**common, "api_key": "wrong"}))
    raises(litellm.NotFoundError, lambda: litellm.completion(**{**common, "model": "openai/gpt-4o"}))


def llm_client(_):
    user = os.environ["LLM_USER_PATH"]
    os.makedirs(user, exist_ok=True)
    with open(os.path.join(user, "extra-openai-models.yaml"), "w") as models:
        models.write(f'- model_id: calc\n  model_name: calc\n  api_base: "{URL}"\n  api_key_name: og\n')

    def llm(*args):
        program = os.path.join(os.path.dirname(sys.executable), "llm")
        done = subprocess.run([program, *args], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    llm("keys", "set", "og", "--value", KEY)
    assert llm("-m", "calc", "What is 2+2?") == "4"
    assert llm("-m", "calc", "--no-stream", "Count to 50") == NUMBERS


def curl_client(_):
    def curl(*args):
        return subprocess.run(["curl", "-sS", "-m", "30", *args], capture_output=True, text=True, check=True).stdout

    bearer = ["-H", f"Authorization: Bearer {KEY}"]
    status = ["-o", "/dev/null", "-w", "%{http_code}"]
    body = ["-H", "Content-Type: application/json", "-d", json.dumps({"model": "calc", "messages": TWO})]
    assert json.loads(curl(*bearer, *body, URL + "/chat/completions"))["choices"][0]["message"]["content"] == "4"
    assert curl(*status, URL + "/models") == "401"
    assert curl(*status, *bearer, "-H", "Host: evil.example", URL + "/models") == "403"
    assert curl(*status, *bearer, "-H", "Origin: https://evil.example", URL + "/models") == "403"
    assert curl(*status, *bearer, "-d", "{}", URL + "/chat/completions") == "415"
    assert curl(*status, *bearer, "-I", URL + "/models") == "200"
    assert json.loads(curl(URL.removesuffix("/v1") + "/health"))["status"] == "ok"
    # Above 1 MiB curl asks first whether it may send.
    large = json.dumps({"model": "calc", "messages": TWO, "user": "x" * (1 << 20)})
    sent = subprocess.run(
        ["curl", "-sS", "-m", "30", *bearer, "-H", "Content-Type: application/json", "-d", "@-", URL + "/chat/completions"],
        input=large, capture_output=True, text=True, check=True,
    )
    assert json.loads(sent.stdout)["choices"][0]["message"]["content"] == "4"


def main():
    client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
    tests = [
        openai_models, openai_whole, openai_conversation, openai_stream, openai_helper_stream, openai_completions, openai_errors,
        openai_retries, openai_wishes, openai_leaves, openai_async, litellm_client, llm_client, curl_client,
    ]
    failed = 0
    for test in tests:
        began = time.monotonic()
        try:
            test(client)
            print(f"ok      {test.__name__} ({time.monotonic() - began:.2f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {test.__name__}", flush=True)
            traceback.print_exc(file=sys.stdout)
    print(f"test result: {len(tests) - failed} passed; {failed} failed", flush=True)
    sys.exit(1 if failed else 0)


main()
