# The PLM owner's server; how to run it: docs/serving.md, "In a container".
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# An index with other builds of torch; the default index has the CUDA build, which also runs on the CPU.
ARG TORCH_INDEX=
COPY requirements/locked.txt /tmp/locked.txt
COPY --from=wheel /wheels /tmp/wheels
# The versions of the locked set, which are the tested ones.
RUN sed -e '/--hash/d' -e 's/ *\\$//' /tmp/locked.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.9,<=2.13.0' \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /tmp/wheels/pema-*.whl)[serve]" \
    && rm -r /tmp/locked.txt /tmp/constraints.txt /tmp/wheels \
    && useradd --system --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin pema \
    && install --directory --owner pema --mode 0700 /cache

ENV HF_HOME=/cache/huggingface PEMA_CACHE=/cache/pema PYTHONUNBUFFERED=1
USER pema
# The PLM at /plm, policy and TLS files in /etc/pema: all are mounted, none is in the image.
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-m", "pema.serving.health"]
ENTRYPOINT ["pema", "serve"]
CMD ["/plm", "--host", "0.0.0.0", "--port", "8000", "--policy", "/etc/pema/policy.toml", \
     "--tls-cert", "/etc/pema/cert.pem", "--tls-key", "/etc/pema/key.pem"]
