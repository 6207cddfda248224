"""A FastAPI handler as a careful engineer writes it: the session is made once, work goes to a few threads.

The runtime and the decoder release the interpreter's lock, so threads keep the event loop free; more of them than two
would only wait for the one core.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from benchmarks.peers.model import PORT, Answer, answers, decoded, open_session

app = FastAPI()
session = open_session()
threads = ThreadPoolExecutor(2)


def classified(content: bytes) -> Answer:
    """One image, alone."""
    return answers(session, [decoded(content)])[0]


@app.post("/classify")
async def classify(request: Request) -> Response:
    """Classify the image that is the body."""
    content = await request.body()
    return JSONResponse(await asyncio.get_running_loop().run_in_executor(threads, classified, content))


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, loop="uvloop", http="httptools", log_level="warning", access_log=False)
