# An image with the service only. It contains no torch and no compiler, and writes no files at run time.
#
#   docker build -t ltkd .
#   docker run --rm -p 8000:8000 --read-only --cap-drop ALL -v "$PWD/bundles/demo:/bundle:ro" ltkd
#
# After SIGTERM the service reports that it is not ready for LTKD_DELAY_SECONDS (0.5 by default), then drains for at most
# LTKD_DRAIN_SECONDS (8). The stop timeout of the container must be longer than both together; that of docker stop is
# 10 s. Every setting of the service can be given as an LTKD_ variable.

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY ltkd ltkd
COPY export export
COPY serve serve
RUN python -m venv /opt/ltkd && /opt/ltkd/bin/pip install --no-cache-dir -c constraints.txt ".[serve]"

FROM python:3.11-slim
COPY --from=build /opt/ltkd /opt/ltkd
ENV PATH=/opt/ltkd/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LTKD_HOST=0.0.0.0 LTKD_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "-c", "import http.client, os; line = http.client.HTTPConnection('127.0.0.1', int(os.environ['LTKD_PORT']), timeout=2); line.request('GET', '/readyz'); raise SystemExit(line.getresponse().status != 200)"]
CMD ["ltkd", "serve", "/bundle"]
