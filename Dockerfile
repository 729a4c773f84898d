# Build:  docker build -t mlpmixer-flax .      (GPU: add --build-arg EXTRAS=[cuda])
# Train:  mkdir -p runs && docker run --user "$(id -u)" -v "$PWD/runs:/data/runs" mlpmixer-flax
#         (GPU: add --gpus all)
# Arguments after the image name replace the CMD line below, for example: mlpmixer_flax.train --help
# Your photos: add -v "$PWD/photos:/data/photos", and train with --config=configs/finetune_folder.py
FROM python:3.12-slim

ARG EXTRAS=""
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY mlpmixer_flax mlpmixer_flax
COPY configs configs
RUN pip install --no-cache-dir ".$EXTRAS"

# The installed package contains the configs and the digits. Nothing below needs the source.
RUN useradd mixer && install --directory --owner mixer /data
USER mixer
WORKDIR /data
# Any --user can write here. Downloads stay after the container has ended.
ENV HOME=/data/runs
ENTRYPOINT ["python", "-m"]
CMD ["mlpmixer_flax.train", "--config=configs/digits.py", "--workdir=runs/digits"]
