"""The field's other words for keys of the configuration, as people type them: 'lr', 'bs', 'cfg'."""

# Words, as they are with '-' and '_' left out: the keys they can mean, the likeliest first.
_MEANINGS = {
    "lr learnrate maxlr baselr peaklr": ("optimizer.learning_rate",),
    "minlr finallr endlr": ("optimizer.final_learning_rate",),
    "wd decay": ("optimizer.weight_decay", "ema.decays"),
    "clip gradclip clipgrad maxgradnorm gradnorm clipnorm gradclipnorm": (
        "optimizer.gradient_clip_norm",
    ),
    "warmup warmupiters lrwarmup lrwarmupsteps": ("optimizer.warmup_steps",),
    "lrschedule scheduler lrscheduler schedule": ("optimizer.schedule",),
    "opt optim optimizer": ("optimizer.name",),
    "betas beta beta1 adambeta1": ("optimizer.adamw.beta1",),
    "beta2 adambeta2": ("optimizer.adamw.beta2",),
    "adamepsilon adameps": ("optimizer.adamw.epsilon",),
    "bs batch batchsize globalbatchsize trainbatchsize minibatch": (
        "training.batch_size",
        "sampling.batch_size",
    ),
    "steps step numsteps iters iterations niter numiters maxsteps maxiters totalsteps trainsteps "
    "maxtrainsteps numtrainsteps epochs numepochs duration": (
        "training.num_steps",
        "sampling.steps",
    ),
    "nfe samplingsteps samplesteps numsamplingsteps numinferencesteps inferencesteps": (
        "sampling.steps",
    ),
    "accum gradaccum gradientaccumulation gradientaccumulationsteps accumulationsteps microbatches "
    "microbatch": ("training.num_microbatches",),
    "saveevery ckptevery checkpointevery saveinterval checkpointinterval savesteps saves": (
        "training.checkpoint_every",
    ),
    "logevery loginterval loggingsteps printevery logsteps": ("training.log_every",),
    "sampleevery sampleinterval previewinterval visevery": ("training.preview_every",),
    "keep maxtokeep numcheckpoints savetotallimit": ("training.keep_last",),
    "tb": ("training.tensorboard",),
    "ema emadecay emarate emabeta emadecays": ("ema.decays",),
    "emastd posthocema": ("ema.power_stds",),
    "cfg cfgscale cfgw guidance guidancescale guidanceweight w scale omega": (
        "sampling.guidance_scale",
        "teacher.guidance_scale",
    ),
    "cfginterval interval": ("sampling.guidance_interval", "teacher.guidance_interval"),
    "sampler solver ode": ("sampling.solver",),
    "eta ddimeta": ("sampling.ddim.eta",),
    "layers numlayers nlayers nlayer numblocks blocks depth": ("model.dit.depth",),
    "width dim hidden hiddendim hiddenwidth dmodel embeddim embdim modeldim": (
        "model.dit.hidden_size",
    ),
    "heads nheads nhead numhead attentionheads numattentionheads": ("model.dit.num_heads",),
    "mlp ffnratio mlpdim": ("model.dit.mlp_ratio",),
    "patch patchsize": ("model.dit.patch_size",),
    "res resolution imgsize size imagesize inputsize samplesize": ("model.image_size",),
    "channels inchans inch imagechannels imgchannels": ("model.in_channels",),
    "classes nclasses nclass numclass": ("model.num_classes",),
    "precision mixedprecision fp16 bf16 amp": ("model.dtype",),
    "checkpointing gradcheckpointing gradientcheckpointing gradckpt remat rematpolicy": (
        "model.remat",
    ),
    "flashattention flash attn attnimpl": ("model.attention",),
    "arch network net backbone": ("model.name",),
    "dropout classdropout classdropoutprob labeldropout labeldrop labeldropprob cfgdropout "
    "uncond puncond condropprob": ("method.label_dropout",),
    "objective algorithm algo": ("method.name",),
    "workers nworkers numworkers dataloaderworkers": ("data.num_workers",),
    "flip hflip mirror xflip horizontalflip randomflip": ("data.horizontal_flip",),
    "dataset datasetname": ("data.name", "data.tfds.dataset"),
    "path datapath datadir dataroot datasetpath imagedir traindir": (
        "data.image_folder.path",
        "teacher.path",
        "autoencoder.path",
    ),
    "vae vaepath ae autoencoder": ("autoencoder.path",),
    "pred predtype prediction predictiontype parameterization": ("process.ddpm.prediction",),
    "timesteps numtimesteps diffusionsteps noisesteps t": ("process.ddpm.num_timesteps",),
    "noiseschedule diffusion": ("process.name",),
    "sigmadata": ("process.edm.sigma_data",),
    "snrgamma minsnr minsnrgamma": ("loss.min_snr.gamma",),
    "lossweighting lossweight weighting": ("loss.weighting",),
    "timesampling timestepsampling tsampling": ("timesteps.name",),
    "teacherpath teacher": ("teacher.path",),
    "fidsamples numsamples nsamples numfidsamples evalsamples": ("evaluation.num_images",),
    "tp tensorparallel tensorparallelsize modelparallel": ("mesh.tensor",),
    "dp dataparallel ddp": ("mesh.data",),
    "fsdpsize zero": ("mesh.fsdp",),
    "sp cp sequenceparallel contextparallel": ("mesh.sequence",),
    "randomseed rng": ("seed",),
    "run runname experiment expname": ("name",),
}
_KEYS = {word: keys for words, keys in _MEANINGS.items() for word in words.split()}


def meant_by(word: str) -> tuple[str, ...]:
    """The flat keys that a word of the field can mean, the likeliest first; () if none is known."""
    return _KEYS.get(word.lower().replace("_", "").replace("-", ""), ())
