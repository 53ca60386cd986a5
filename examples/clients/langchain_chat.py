"""LangChain's ChatOpenAI: an answer, a stream with usage, a chain.

olmoe serve --model olmoe-tiny, then: python examples/clients/langchain_chat.py
"""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(
    model=os.environ.get("MODEL", "olmoe-tiny"),
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    max_tokens=40,
    temperature=0.7,
    stream_usage=True,  # it is asked for on OpenAI's own address only, unless told to
    extra_body={"top_k": 50},
)

print(chat.invoke("Tell me a story.").content)

usage = None
for chunk in chat.stream("Tell me a story."):
    print(chunk.content, end="", flush=True)
    usage = chunk.usage_metadata or usage
print("\n", usage["output_tokens"], "tokens")

chain = ChatPromptTemplate.from_template("Tell me a story about a {thing}.") | chat | StrOutputParser()
print(chain.batch([{"thing": "dog"}, {"thing": "ball"}]))
