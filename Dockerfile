# Build:  docker build -t mlpmixer-flax .      (GPU: add --build-arg EXTRAS=[cuda])
# Train:  mkdir -p runs && docker run --user "$(id -u)" -v "$PWD/runs:/data/runs" mlpmixer-flax
# Arguments after the image's name replace the last line: mlpmixer_flax.train --help      (GPU: add --gpus all)
# Your photos: add -v "$PWD/photos:/data/photos", and train with --config=configs/finetune_folder.py
FROM python:3.12-slim

ARG EXTRAS=""
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY mlpmixer_flax mlpmixer_flax
COPY configs configs
RUN pip install --no-cache-dir ".$EXTRAS"

# The installed package carries the configs and the digits: nothing below needs the source.
RUN useradd mixer && install --directory --owner mixer /data
USER mixer
WORKDIR /data
# Writable for any --user; what is downloaded outlives the container there.
ENV HOME=/data/runs
ENTRYPOINT ["python", "-m"]
CMD ["mlpmixer_flax.train", "--config=configs/digits.py", "--workdir=runs/digits"]
