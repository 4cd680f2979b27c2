# docker build -f deploy/gpu.Dockerfile -t script-llava .      from the root of the repository, with BuildKit
FROM vllm/vllm-openai:v0.32.0

RUN useradd --create-home --uid 2000 script && install --directory --owner 2000 /home/script/huggingface
WORKDIR /opt/script
COPY pyproject.toml README.md LICENSE ./
COPY llava llava
# What the image has stays as it is: these are the versions that its kernels were built for.
RUN uv pip freeze --system >/tmp/all.txt \
    && grep -E '^(torch|torchvision|transformers|numpy|vllm)==' /tmp/all.txt >/tmp/kept.txt \
    && uv pip install --system --no-cache --constraint /tmp/kept.txt . \
    && rm -rf /tmp/all.txt /tmp/kept.txt build ./*.egg-info
COPY deploy/start.sh deploy/ask_picture.py deploy/picture.png deploy/
COPY deploy/serve.yaml /etc/script/

USER 2000
ENV HF_HOME=/home/script/huggingface \
    PROMETHEUS_MULTIPROC_DIR=/tmp/script-metrics \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000
ENTRYPOINT ["/opt/script/deploy/start.sh"]
CMD ["--config", "/etc/script/serve.yaml"]
