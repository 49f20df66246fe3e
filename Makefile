# Make-A-Video: every command of the project. `make help` lists them.

# Films are of the weights in this repository, all else is of the demo, unless SIZE says otherwise.
FILMS := $(or $(SIZE),emoji)
override SIZE := $(or $(SIZE),tiny)
STAGE ?= decoder
ARGS ?=
DATA ?= experiments/demo/pairs
FORWARD ?= 1
BACKWARD ?= 0
BEFORE ?= a photo
GPUS ?= 8
VENV ?= .venv
PYTHON ?= python3

# The virtual environment is whole when this file is in it; it is made anew when the dependencies change.
READY := $(VENV)/.installed
# In the conda environment of environment.yml everything is there already.
ifeq ($(CONDA_DEFAULT_ENV),make-a-video)
VENV := $(CONDA_PREFIX)
READY := pyproject.toml
endif
RUN := $(VENV)/bin/python

# What people write reaches the commands through the environment, as it is: quotes, $ and backticks in it are letters.
$(foreach v,PROMPT BEFORE IMAGE TO VIDEO FROM,$(if $(filter undefined,$(origin $v)),,$(eval \
	override export $v := $$(value $v))))
SENTENCE := "$${PROMPT-a 3D emoji of octopus}"
# Of every film: PRESET=draft FORMATS=mp4,gif SIZE_OUT=768, and SEED=3 STOP=low, which the page of `make app` asks for.
SAMPLED = $(if $(PRESET),cascade.preset=$(PRESET)) $(if $(SIZE_OUT),size_out=$(SIZE_OUT)) \
	$(if $(FORMATS),'formats=[$(FORMATS)]')
FILM = $(if $(SEED),seed=$(SEED)) $(SAMPLED) $(if $(STOP),stop=$(STOP)) $(if $(WEIGHT),weight=$(WEIGHT)) $(ARGS)
# Where the files are now that a film is made again of; nothing else may be said of it.
MOVED = $(if $(IMAGE),input="$$IMAGE") $(if $(TO),input="$$TO") $(if $(VIDEO),input="$$VIDEO") $(if $(PROMPT),prompt="$$PROMPT")
# On a CPU a training step frees and takes the same gigabytes again and again; glibc gives them back to the system in
# between, which costs a fifth of the step.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.DEFAULT_GOAL := help
.PHONY: help install demo plan index inspect embed train-clip train-prior train-decoder train-sr-low train-sr-high \
	finetune-video train-interpolation generate app animate between extend vary edit export curve eval-fvd eval-clipsim \
	eval-fid eval-is eval-ucf101 eval-msrvtt compare human-eval human-tally \
	gallery showcase report dashboard bench bench-model bench-data bench-generate \
	bench-metrics test golden lint clean

help: ## print this list
	@echo 'make TARGET [SIZE=tiny|emoji|small|base|paper] [ARGS="trainer.max_steps=1500 ..."]'
	@echo 'Without SIZE films are of emoji, whose weights are in the repository, and all else is of tiny, the demo.'
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## make .venv with all packages (uv where present, pip where not)

ifneq ($(CONDA_DEFAULT_ENV),make-a-video)
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name it with PYTHON=python3.12")'
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --compile-bytecode --python $(RUN) --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && $(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@
endif

demo: $(READY) ## train all five networks on the data in the repository, then write a film for PROMPT; goes on if interrupted
	@$(RUN) -m experiments.demo $(SIZE) $(SENTENCE) $(ARGS)

plan: $(READY) ## what SIZE takes on GPUS=8: memory by strategy, largest batches, days, dollars
	@$(RUN) -m experiments.plan $(SIZE) gpus=$(GPUS) $(ARGS)

train-clip: $(READY) ## our own CLIP, where the config names no pretrained one
	@$(RUN) -m experiments.train clip $(SIZE) $(ARGS)

index: $(READY) ## an index beside each tar shard, once: training then starts at once
	@$(RUN) -m experiments.prepare index $(SIZE) $(ARGS)

inspect: $(READY) ## what the images or videos at DATA=path hold, what filters would take, a contact sheet
	@$(RUN) -m experiments.prepare inspect "$(DATA)" $(ARGS)

embed: $(READY) ## CLIP embeddings beside the shards, once; train P and D from them with ARGS=data.embeddings=true
	@$(RUN) -m experiments.prepare embed $(SIZE) $(ARGS)

train-prior: $(READY) ## P: text to CLIP image embedding
	@$(RUN) -m experiments.train prior $(SIZE) $(ARGS)

train-decoder: $(READY) ## D: embedding to image
	@$(RUN) -m experiments.train decoder $(SIZE) $(ARGS)

train-sr-low: $(READY) ## SR_l: the first super-resolution, on images
	@$(RUN) -m experiments.train sr_low $(SIZE) $(ARGS)

train-sr-high: $(READY) ## SR_h: the second super-resolution, on images
	@$(RUN) -m experiments.train sr_high $(SIZE) $(ARGS)

finetune-video: $(READY) ## D^t from D on unlabeled clips; STAGE=sr_low or sr_high for the others
	@$(RUN) -m experiments.train $(STAGE)_video $(SIZE) $(ARGS)

train-interpolation: $(READY) ## upF from D^t: 16 frames to 76
	@$(RUN) -m experiments.train interpolation $(SIZE) $(ARGS)

generate: $(READY) ## a film for PROMPT="..."; SEED=, PRESET=draft|standard|paper, SIZE_OUT=768, STOP=, FORMATS=mp4,webm,gif,webp,png; FROM=film again (IMAGE=, TO=, VIDEO= where its files are now)
	@$(RUN) -m experiments.generate $(if $(FROM),again "$$FROM" $(MOVED) $(FILM),$(FILMS) text $(SENTENCE) $(FILM))

animate: $(READY) ## IMAGE=picture set in motion
	@$(RUN) -m experiments.generate $(FILMS) animate "$$IMAGE" $(FILM)

between: $(READY) ## the passage from IMAGE=picture to TO=picture
	@$(RUN) -m experiments.generate $(FILMS) between "$$IMAGE" "$$TO" $(FILM)

extend: $(READY) ## what comes after VIDEO=film, FORWARD=1 times, and what came before, BACKWARD=0 times
	@$(RUN) -m experiments.generate $(FILMS) extend "$$VIDEO" forward=$(FORWARD) backward=$(BACKWARD) $(FILM)

vary: $(READY) ## another film of what VIDEO=film shows
	@$(RUN) -m experiments.generate $(FILMS) vary "$$VIDEO" $(FILM)

edit: $(READY) ## a film of IMAGE=picture moved from BEFORE="what it shows" towards PROMPT="what it becomes", WEIGHT=0.35
	@$(RUN) -m experiments.generate $(FILMS) edit "$$IMAGE" "$$PROMPT" before="$$BEFORE" $(FILM)

export: $(READY) ## CLIP and the five networks of SIZE as one folder, runs/SIZE/pretrained, for MakeAVideo.from_pretrained
	@$(RUN) -m experiments.export $(SIZE) $(ARGS)

curve: $(READY) ## how far D^t's clips are from real ones by the number of network calls: runs/SIZE/curve/calls.svg; ARGS=over=guidance: and CLIPSIM, by guidance
	@$(RUN) -m experiments.curve $(SIZE) $(ARGS)

app: $(VENV)/.app ## the cascade of SIZE as a page at 127.0.0.1: a tab for each use
	@$(RUN) -m experiments.app $(FILMS) $(SAMPLED) $(ARGS)

eval-fvd: $(READY) ## Frechet video distance of generated clips (fvd_random without the I3D weights)
	@$(RUN) -m experiments.evaluate fvd $(SIZE) $(ARGS)

eval-clipsim: $(READY) ## CLIP similarity of prompts and generated clips
	@$(RUN) -m experiments.evaluate clipsim $(SIZE) $(ARGS)

eval-fid: $(READY) ## Frechet distance of frames, by Inception-v3 and by CLIP
	@$(RUN) -m experiments.evaluate fid $(SIZE) $(ARGS)

eval-is: $(READY) ## video inception score, by C3D
	@$(RUN) -m experiments.evaluate is $(SIZE) $(ARGS)

eval-ucf101: $(READY) ## the paper's UCF-101 benchmark: FVD, KVD, IS beside published rows (ARGS="ucf101=folder ...")
	@$(RUN) -m experiments.evaluate ucf101 $(SIZE) $(ARGS)

eval-msrvtt: $(READY) ## the paper's MSR-VTT benchmark: FID, CLIP-FID, CLIPSIM beside published rows (ARGS="msrvtt=folder ...")
	@$(RUN) -m experiments.evaluate msrvtt $(SIZE) $(ARGS)

compare: $(READY) ## D^t beside itself before video, a still, and real clips: CLIPSIM, distance, motion; by what was trained on
	@$(RUN) -m experiments.compare $(SIZE) $(ARGS)

human-eval: $(READY) ## a page on which people compare the films of two folders, A=folder B=folder
	@$(RUN) -m experiments.human_eval "$(A)" "$(B)" $(ARGS)

human-tally: $(READY) ## what the raters of FOLDER=runs/human prefer: majorities of five, with Wilson's interval
	@$(RUN) -m experiments.human_tally $(or $(FOLDER),runs/human)

gallery: $(READY) ## one HTML page of films beside real clips with the scores: those of SIZE, or in FOLDER=...
	@$(RUN) -m experiments.gallery $(SIZE) $(FOLDER) $(ARGS)

showcase: $(READY) ## pictures of what SIZE has learnt: its stills in training, films of sentences, stills set in motion
	@$(RUN) -m experiments.showcase $(SIZE) $(ARGS)

report: $(READY) ## one HTML page with curves, pictures and counts of all stages of SIZE, or of FOLDER=runs/tiny/decoder
	@$(RUN) -m experiments.report $(or $(FOLDER),$(SIZE)) $(ARGS)

dashboard: $(READY) ## the W&B workspace of SIZE, a section for each stage, saved to your project (needs WANDB_API_KEY)
	@$(RUN) -m experiments.dashboard $(SIZE) $(ARGS)

bench: bench-model bench-data bench-generate bench-metrics ## all benchmarks

bench-model: $(VENV)/.bench ## speed and memory of the video U-Net beside published ones
	@KINETO_LOG_LEVEL=5 $(RUN) -m experiments.bench_model $(ARGS)

bench-data: $(VENV)/.bench ## images and clips a second, beside the bare limit and common loaders
	@$(RUN) -m experiments.bench_data $(ARGS)

bench-generate: $(READY) ## seconds and memory of each stage of a film at every size, and what the cascade adds to its networks
	@KINETO_LOG_LEVEL=5 $(RUN) -m experiments.bench_generate $(ARGS)

bench-metrics: $(READY) ## I3D's features a second beside the plain network, and seconds of the distances
	@$(RUN) -m experiments.bench_metrics $(ARGS)

# Extras: what the benchmarks measure us against, and what draws the page.
$(VENV)/.bench $(VENV)/.app: $(VENV)/.%: $(READY)
	@if command -v uv >/dev/null; then \
		uv pip install --quiet --compile-bytecode --python $(RUN) --constraint constraints.txt --editable '.[$*]'; \
	else $(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$*]'; fi
	@touch $@

test: $(READY) ## the tests: no network, no GPU
	@$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

golden: $(READY) ## rewrite the losses that tests hold training to, after a change that is meant to change them
	@GOLDEN=write $(RUN) -m pytest tests/experiments/test_resume.py -k golden

lint: $(READY) ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

clean: ## remove the virtual environment; run folders stay
	rm -rf $(VENV) *.egg-info
