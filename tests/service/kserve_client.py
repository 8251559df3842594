"""KServe's own client against a server, in a process of its own: its protobufs and Triton's cannot be in one.

python -m tests.service.kserve_client URL v1|v2 < arrays.npz > answer.json
"""

import asyncio
import base64
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np

from tests.service.serving import PROJECT_ROOT


def ask(url: str, protocol: str, **given: np.ndarray) -> dict[str, Any]:
    """What the client said and got; `given` are inputs of V2, or `image` and `target` of V1."""
    buffer = io.BytesIO()
    np.savez(buffer, **given)
    command = [sys.executable, "-m", __name__, url, protocol]
    done = subprocess.run(command, input=buffer.getvalue(), capture_output=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def _v2(url: str, given: dict[str, np.ndarray]) -> dict[str, Any]:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.utils.numpy_codec import from_np_dtype

    answer: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        answer["live"] = await client.is_server_live(url)
        answer["ready"] = await client.is_server_ready(url)
        answer["models"] = [await client.is_model_ready(url, name) for name in ("tiny", "no_such_model")]
        for binary in (True, False):
            inputs = []
            for name, data in given.items():
                inputs.append(InferInput(name, list(data.shape), from_np_dtype(data.dtype)))
                inputs[-1].set_data_from_numpy(data, binary_data=binary)
            request = InferRequest("tiny", inputs, request_id="k", parameters={"binary_data_output": binary})
            response = await client.infer(url, request, model_name="tiny")
            answer["binary" if binary else "json"] = {
                "about": [response.id, response.model_name],
                "outputs": {output.name: output.as_numpy().tolist() for output in response.outputs},
            }
    return answer


async def _v1(url: str, given: dict[str, np.ndarray]) -> dict[str, Any]:
    from kserve import InferenceRESTClient, RESTConfig

    instance = {"image": {"b64": base64.b64encode(given["image"].tobytes()).decode()}}
    target = {"target": int(given["target"]), "saliency": "list"}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        return {
            "ready": await client.is_model_ready(url, "tiny"),
            "predict": await client.infer(url, {"instances": [instance]}, model_name="tiny"),
            "explain": await client.explain(url, "tiny", {"instances": [instance | target]}),
        }


if __name__ == "__main__":
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as arrays:
        contents = dict(arrays)
    print(json.dumps(asyncio.run({"v1": _v1, "v2": _v2}[sys.argv[2]](sys.argv[1], contents))))
