"""A carefully written FastAPI handler: one session, and two threads for the work.

The runtime and the decoder release the interpreter lock, so the threads keep the event loop free. More than two threads
would compete for the one core.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from benchmarks.peers.model import PORT, ClassifyResponse, classify_batch, decode, open_session

app = FastAPI()
session = open_session()
threads = ThreadPoolExecutor(2)


def classify_image(content: bytes) -> ClassifyResponse:
    """Classify one image in a batch of one."""
    return classify_batch(session, [decode(content)])[0]


@app.post("/classify")
async def classify(request: Request) -> Response:
    """Classify the image in the body."""
    content = await request.body()
    return JSONResponse(await asyncio.get_running_loop().run_in_executor(threads, classify_image, content))


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, loop="uvloop", http="httptools", log_level="warning", access_log=False)
