"""OpenAI's asynchronous client: eight streams at once, one of them left early. The server batches the others.

olmoe serve --model olmoe-tiny, then: python examples/clients/openai_async.py
"""

import asyncio
import os

from openai import AsyncOpenAI


async def tell(client: AsyncOpenAI, model: str, number: int) -> str:
    """One story; the first is left after its start, and then the server stops it."""
    text = ""
    stream = await client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=60, temperature=0.8, seed=number, stream=True
    )
    async with stream:
        async for chunk in stream:
            text += chunk.choices[0].text
            if number == 0 and len(text) > 20:
                break
    return text


async def main() -> None:
    """Ask for all of them at the same time."""
    base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    async with AsyncOpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id
        for number, text in enumerate(await asyncio.gather(*(tell(client, model, i) for i in range(8)))):
            print(number, text.replace("\n", " "))


asyncio.run(main())
