"""Every key of the configuration with its default and meaning.

An experiment starts from `default_config()` and states only what differs. Where one of several
things is chosen by `name`, each has a namespace of its own (`process.ddpm`, `process.edm`, ...).
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

# Keys of the methods with a discriminator.
_ADVERSARIAL = {
    "student_update_frequency": 5,  # updates of a round: one of the student, the rest its critics'
    "student_input": "data",  # data (renoised) | simulation (the student's own), of several steps
    "discriminator_learning_rate": 0.0,  # 0: config.optimizer's
    "feature_indices": (),  # feature maps it reads; empty: a U-Net's last, a transformer's middle
    "same_noise": False,  # renoise real and generated data alike
    "r1_weight": 0.0,  # of the approximate R1 penalty (APT); 0: none
    "r1_noise": 0.1,  # its perturbation of data
}

_DMD2 = {
    **_ADVERSARIAL,
    "fake_score_learning_rate": 0.0,  # 0: config.optimizer's
    "fake_score_loss": "raw",  # raw (the process's own) | x0 | eps | velocity
    "gan_weight": 0.001,  # of the student's GAN loss; 0: no discriminator
    "gan_critic_weight": 1.0,  # of the discriminator's loss beside the fake score's
    "features_of": "teacher",  # teacher | fake_score: whose features the discriminator reads
}


# Namespaces of what was registered beside what the library has: {section: {name: options}}.
_REGISTERED: dict[str, dict[str, dict[str, Any]]] = {}


def register_namespace(section: str, name: str, options: Mapping[str, Any]) -> None:
    """Adds the options of a network, method, solver or source of data to the configuration.

    They become config.<section>.<name>.<option>, with these defaults. Options that a section has
    for all its choices already (config.model.image_size) stay there, and get no second place.

    Args:
        section: 'model', 'method', 'sampling' or 'data'.
        name: of the choice.
        options: defaults by name: numbers, texts, booleans or tuples of these.

    Raises:
        ValueError: the name is taken by another choice of the section.
    """
    taken = _library_config()[section].get(name)
    if taken is not None or _REGISTERED.get(section, {}).get(name, options) != options:
        raise ValueError(f"config.{section}.{name} is there already: choose another name")
    _REGISTERED.setdefault(section, {})[name] = dict(options)


def default_config() -> ml_collections.ConfigDict:
    """The default experiment: DiT-XL/2 on 256-pixel ImageNet latents, as in the paper."""
    config = _library_config()
    with config.unlocked():
        for section, choices in _REGISTERED.items():
            for name, options in choices.items():
                own = {key: value for key, value in options.items() if key not in config[section]}
                config[section][name] = ml_collections.ConfigDict(own)
    return config


def _library_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "name": "",  # shown in logs and reports
            "seed": 0,  # of initialisation, noise, and data order
            "model": {
                "name": "dit",  # dit | song_unet | dhariwal_unet
                "image_size": 32,  # input side: latents are 32 for 256 pixels, 64 for 512
                # (height, width) if not a square of image_size, whose layers' names a U-Net keeps.
                "input_size": (),
                "in_channels": 4,  # of images or latents: 1 grey, 3 RGB, 4 latents of SD's VAE
                "num_classes": 1000,  # 0: unconditional
                "second_time": "none",  # none | r | t-r: what else of time the network sees
                "augment_dim": 0,  # labels of config.augmentation that the network sees
                "remat": "none",  # none | block | dots
                "attention": "auto",  # einsum | xla | cudnn | cpu | auto: by backend
                "custom_gradients": "auto",  # on | off (where jax.jvp is needed) | auto: on on CPUs
                "dtype": "auto",  # of matrix products; auto: bfloat16 on accelerators
                # Stored; auto: as the sampled checkpoint's file. Training: float32 (or auto) only.
                "param_dtype": "auto",  # float32 | bfloat16 | auto
                "dit": {  # DiT and SiT
                    "patch_size": 2,  # side of the square of the input that becomes a token
                    "hidden_size": 1152,  # width of the blocks
                    "depth": 28,  # blocks
                    "num_heads": 16,  # of attention
                    "mlp_ratio": 4.0,  # width of a block's MLP over hidden_size
                    "null_class": True,  # whether there is a "no class", which guidance needs
                    "learn_sigma": True,  # predict the variance, too (of process ddpm)
                    "time_frequency_spacing": "original",  # original | diffusers
                    "mlp_norm_epsilon": 1e-6,  # 1e-5 in diffusers' default DiT
                    "layer_loop": "auto",  # scan | unroll | auto: by backend
                },
                "song_unet": {  # EDM's DDPM++ (these defaults) and NCSN++
                    "model_channels": 128,
                    "channel_mult": (2, 2, 2),
                    "channel_mult_emb": 4,
                    "num_blocks": 4,
                    "attn_resolutions": (16,),
                    "dropout": 0.10,
                    "embedding_type": "positional",  # positional | fourier (NCSN++)
                    "channel_mult_noise": 1,  # 2 for NCSN++
                    "encoder_type": "standard",  # standard | skip | residual (NCSN++)
                    "decoder_type": "standard",  # standard | skip
                    "resample_filter": (1, 1),  # (1, 3, 3, 1) for NCSN++
                },
                "dhariwal_unet": {  # ADM
                    "model_channels": 192,
                    "channel_mult": (1, 2, 3, 4),
                    "channel_mult_emb": 4,
                    "num_blocks": 3,
                    "attn_resolutions": (32, 16, 8),
                    "dropout": 0.10,
                },
            },
            "process": {
                "name": "ddpm",  # ddpm | flow | edm
                "ddpm": {
                    "num_timesteps": 1000,  # noise levels
                    "beta_start": 1e-4,  # variance of the first level's noise
                    "beta_end": 2e-2,  # of the last level's; linear in between
                    "prediction": "eps",  # eps | x0 | velocity
                },
                "flow": {
                    "network_convention": "sit",  # sit | flux
                    "time_scale": 1.0,  # multiplies the time the network sees
                },
                "edm": {
                    "sigma_data": 0.5,  # standard deviation of the data
                    "sigma_min": 0.002,  # where sampling ends, before 0
                    "sigma_max": 80.0,  # where sampling starts
                    "preconditioning": "edm",  # edm | vp | ve | iddpm: how the network is wrapped
                    "vp_beta_d": 19.9,  # of vp: growth of beta from time 0 to 1
                    "vp_beta_min": 0.1,  # of vp: beta at time 0
                    "vp_epsilon_t": 1e-5,  # of vp: smallest time trained on
                    "ve_sigma_min": 0.02,  # of ve: smallest noise level
                    "ve_sigma_max": 100.0,  # of ve: largest noise level
                    "iddpm_c_1": 0.001,  # of iddpm: least ratio of neighbouring alpha bars
                    "iddpm_c_2": 0.008,  # of iddpm: offset of its cosine schedule
                    "num_timesteps": 1000,  # M of vp and iddpm
                },
            },
            "timesteps": {
                # uniform | log_normal | logit_normal | truncated_log_normal | log_student_t |
                # polynomial | speed | speed_first_release
                "name": "uniform",
                "log_normal": {  # log(sigma / alpha) is normal
                    "mean": -1.2,  # of log(sigma / alpha)
                    "std": 1.2,  # standard deviation of log(sigma / alpha)
                },
                "logit_normal": {  # log(t / (1 - t)) is normal
                    "mean": 0.0,  # of log(t / (1 - t)): above 0 more noise
                    "std": 1.0,  # standard deviation of log(t / (1 - t))
                },
                # Between two times; 0: the process's own first or last.
                "truncated_log_normal": {
                    "mean": -1.1,
                    "std": 2.0,
                    "min_time": 0.0,
                    "max_time": 0.0,
                },
                "log_student_t": {  # log(sigma / alpha) is Student-t
                    "mean": 0.0,  # location of log(sigma / alpha)
                    "std": 0.2,  # scale of log(sigma / alpha)
                    "min_time": 0.0,  # smallest time; 0: the process's own
                    "max_time": 0.0,  # largest time; 0: the process's own
                    "df": 0.01,  # degrees of freedom: few of them pile times up at the mean
                },
                # EDM's sampling schedule of that many noise levels, without its ends.
                "polynomial": {
                    "rho": 7.0,
                    "num_levels": 1000,
                    "min_fraction": 0.002,
                    "max_fraction": 0.998,
                },
                "speed": {  # as in the paper; for flow and edm, by the process's own increments
                    "asymmetric": True,
                    "weighted": True,
                    "dual": True,
                    "k": 5.0,
                    "tau": 0,  # index from which the process counts as converged; 0: by process
                    "lam": 0.6,
                },
                "speed_first_release": {  # what the code of SpeeD's first release computes
                    "asymmetric": True,  # draw times by their own distribution, not evenly
                    "weighted": True,  # weight the loss by P2's 1 / (1 + snr)
                    "dual": True,  # the second half of a batch at mirrored times
                },
            },
            "loss": {
                "weighting": "none",  # none | p2 | min_snr
                "p2": {  # weight 1 / (k + snr)^gamma
                    "k": 1.0,  # keeps the weight of noise finite
                    "gamma": 1.0,  # strength; 0: no weight
                },
                "min_snr": {"gamma": 5.0},  # the weight of x0's error, snr, is cut off at gamma
                "vlb_weight": 1.0,  # of the variance term, when model.dit.learn_sigma
            },
            "teacher": {  # of the methods that distil
                "path": "",  # [KIND:]SRC as for --init_from: workdir, .pt, folder, hub:...
                "weights": "ema",  # ema: the first average; or raw, or an average's own name
                "initialize_student": True,  # start from it (unless --init_from says otherwise)
                "guidance_scale": 1.0,  # of the teacher's answers; 1: none
                "guidance_interval": (),  # (low, high) in process time; empty: always
            },
            "method": {
                # denoising | kd | consistency | tcm | scm | mean_flow | dmd2 | f_distill | ladd
                "name": "denoising",
                "label_dropout": 0.1,  # share of labels, if any, replaced by the null class
                "consistency": {
                    "trajectory": "data",  # data (training) | teacher (distillation): x at time r
                    "solver": "euler",  # euler | heun: of the teacher's step from t to r
                    "target": "student",  # whose x0 at r: student (its own), or an average's name
                    "growth": 2.0,  # q: the ratio r / t is 1 - growth^-(stage + 1)
                    "ratio_limit": 0.999,  # its largest value
                    "images_per_stage": 6_400_000,  # images seen until r comes nearer to t
                    "min_r": 0.0,  # smallest noise level of r; 0: clean data
                    "quantize": False,  # t and r are indices (process.name = ddpm)
                    "distance": "pseudo_huber",  # pseudo_huber | l2 | squared_l2
                    "huber_constant": 1e-8,  # c of pseudo_huber, sqrt(|error|^2 + c^2) - c
                    "weighting": "default",  # default: 1 / (t - r) | c_out | c_out_sq | sigma_sq |
                    # sqrt: 1 / sqrt(t - r) | one
                },
                "tcm": {  # the second stage; times are those of config.timesteps
                    "stage1": "",  # the first stage, a consistency model: [KIND:]SRC
                    "stage1_weights": "ema",  # ema: the first average; or raw, or an average's name
                    "transition": 1.0,  # time from which the student takes over
                    "boundary_probability": 0.25,  # share of examples at the transition
                    "boundary_weight": 0.1,  # of their loss
                    "growth": 2.0,  # this and the others as for consistency
                    "ratio_limit": 0.999,
                    "images_per_stage": 1_000_000,
                    "images_before": 0,  # that count as seen, so that the ratio goes on from there
                    "min_r": 0.0,
                    "distance": "pseudo_huber",
                    "huber_constant": 1e-8,
                    "weighting": "default",
                },
                "scm": {
                    "velocity": "teacher",  # teacher (sCD) | data (sCT): which flow is followed
                    "sigma_data": 0.5,  # standard deviation of the data, for TrigFlow
                    "tangent_warmup_steps": 10_000,  # over which the derivative comes in
                    "tangent": "normalize",  # normalize: g / (|g| + constant) | clip: to [-1, 1]
                    "tangent_constant": 0.1,  # added to the norm that the tangent is divided by
                    "spatially_invariant": True,  # |g| a root mean square, not of the sum
                    "adaptive_weighting": True,  # learn a log variance of the loss by noise level
                    "prior_weighting": True,  # divide the loss by sigma / alpha
                    "divide_by_dimension": True,  # the mean square by the values of an example
                    "derivative": "jvp",  # jvp | finite_difference
                    "derivative_dtype": "",  # float32 | bfloat16; empty: as model.dtype
                    "finite_difference_step": 1e-3,  # in log(sigma / alpha)
                },
                "mean_flow": {
                    "velocity": "data",  # data | teacher: whose velocity is learned
                    "direction": "velocity",  # velocity (MeanFlow) | network (improved MeanFlow)
                    "interval_share": 0.25,  # of examples with r < t; of the others r = t
                    "r_distribution": "same",  # same (as timesteps) | uniform | logit_normal
                    "r_mean": 0.0,  # of logit_normal
                    "r_std": 1.0,  # of logit_normal
                    "guidance_omega": 1.0,  # guidance of scale omega / (1 - kappa), from data only
                    "guidance_kappa": 0.0,  # share of the network's own conditional velocity
                    "guidance_interval": (),  # (low, high) times of that; empty: always
                    "loss": "l2",  # l2 | opt_grad
                    "weight_power": 1.0,  # of the adaptive loss weight; 0: none
                    "weight_constant": 0.01,  # kept from the weight's pole
                    "scale_by_dimension": False,  # errors by the root of the pixels, in opt_grad
                    "tangent_warmup_steps": 0,  # over which the derivative comes in
                    "derivative": "jvp",  # jvp | finite_difference
                    "derivative_dtype": "",  # float32 | bfloat16; empty: as model.dtype
                    "finite_difference_step": 1e-3,  # in t
                },
                "kd": {
                    "loss": "mse",  # mse: half the mean square | pseudo_huber
                    "huber_c": 0.0,  # of pseudo_huber; 0: 0.00054 sqrt(values of an example)
                },
                "dmd2": _DMD2,
                "f_distill": {
                    **_DMD2,
                    "divergence": "js",  # js | kl | rkl | sh | neyman | jf | sf
                    "ratio_lower": 0.1,  # real over generated density is clipped to these
                    "ratio_upper": 20.0,  # the largest of it
                    "ratio_normalization": True,  # divide it by its recent mean at like times
                    "ratio_bins": 10,  # of time
                    "ratio_decay": 0.0,  # share of the old mean kept; 0: the batch's own
                },
                "ladd": _ADVERSARIAL,
            },
            "data": {
                "name": "latents",  # digits | image_folder | jpeg_npz | latents | pairs | tfds
                "horizontal_flip": False,  # mirror half of the training images
                "num_workers": 0,  # processes that read and decode; 0: a thread of this one
                "digits": {
                    "resize": "none"
                },  # adm: scale and centre-crop to the model's size | none
                "latents": {
                    "path": "",  # folder that launch/extract_features.py wrote
                    "moments": "sample",  # of the VAE's posterior: sample (at every read) | mean
                },
                "image_folder": {
                    "path": "",  # folder of class subfolders
                    "resize": "adm",  # adm: scale and centre-crop to the model's size | none
                    # Sizes, '192x320,256x256', of which an image gets the one of nearest aspect;
                    # auto:64: all of about the model's pixels in multiples of 64; empty: one size.
                    "buckets": "",
                    "test_fraction": 0.0,  # share held out where the folder has no test/
                    "verify": "fast",  # fast | full | none: looking for corrupt files
                    "index_cache": "",  # where the result of that is kept; empty: beside the data
                },
                "jpeg_npz": {
                    "path": "",  # with {split} where the split's name stands
                    "resize": "none",  # adm: scale and centre-crop to the model's size | none
                },
                "pairs": {"path": ""},  # noise and a teacher's samples, of launch/write_pairs.py
                "tfds": {
                    "dataset": "",  # its name in TFDS, as cifar10
                    "data_dir": "",  # where TFDS keeps it; empty: TFDS's default
                    "resize": "adm",  # adm: scale and centre-crop to the model's size | none
                },
            },
            "augmentation": {  # EDM's, on the device, told to the network (model.augment_dim)
                "probability": 0.0,  # of each transformation, times its multiplier; 0: none
                "xflip": 1e8,  # multipliers, 0 for leaving a transformation out; 1e8: a fair coin
                "yflip": 1.0,
                "rotate_int": 0.0,
                "translate_int": 0.0,
                "scale": 1.0,
                "rotate_frac": 1.0,
                "aniso": 1.0,
                "translate_frac": 1.0,
                "brightness": 0.0,
                "contrast": 0.0,
                "lumaflip": 0.0,
                "hue": 0.0,
                "saturation": 0.0,
                "translate_int_max": 0.125,  # of the side
                "scale_std": 0.2,  # of log2
                "rotate_frac_max": 1.0,  # of 180 degrees
                "aniso_std": 0.2,  # of log2
                "aniso_rotate_prob": 0.5,
                "translate_frac_std": 0.125,  # of the side
                "brightness_std": 0.2,
                "contrast_std": 0.5,  # of log2
                "hue_max": 1.0,  # of 180 degrees
                "saturation_std": 1.0,  # of log2
            },
            "optimizer": {
                "name": "adamw",  # adamw | radam | lion
                "learning_rate": 1e-4,  # after the warm-up
                "schedule": "constant",  # constant | cosine | linear, after the warm-up
                "warmup_steps": 0,  # steps in which the learning rate rises to its value
                "final_learning_rate": 0.0,  # of cosine and linear, at training.num_steps
                "weight_decay": 0.0,  # decoupled, times the learning rate
                "gradient_clip_norm": 0.0,  # 0: no clipping
                "adamw": {
                    "beta1": 0.9,  # decay of the mean of gradients
                    "beta2": 0.999,  # decay of the mean of their squares
                    "epsilon": 1e-8,  # added to the root of that, which divides
                },
                "radam": {
                    "beta1": 0.9,  # decay of the mean of gradients
                    "beta2": 0.999,  # decay of the mean of their squares
                    "epsilon": 1e-8,  # added to the root of that, which divides
                },
                "lion": {
                    "beta1": 0.9,  # share of the mean, beside the gradient, in an update's sign
                    "beta2": 0.99,  # decay of the mean of gradients
                },
            },
            "ema": {
                "decays": (0.9999,),  # constant decays, each its own average
                "power_stds": (),  # EDM2 power-function averages by relative width, e.g. 0.05
                "warmup": True,  # constant decays grow to theirs, as (1 + step) / (10 + step)
            },
            "training": {
                "num_steps": 400_000,  # updates in all; a longer run continues
                "batch_size": 256,  # over all devices
                "num_microbatches": 1,  # gradient accumulation: the batch in so many parts
                "log_every": 100,  # steps between lines of metrics
                "preview_every": 0,  # steps between sample grids; 0: none
                "preview_images": 64,  # of a sample grid
                "checkpoint_every": 5_000,  # steps between checkpoints; 0: the last only
                "keep_last": 2,  # most recent checkpoints kept
                "keep_every": 0,  # also keep checkpoints at multiples of this; 0: none
                "tensorboard": True,  # write events for TensorBoard
                "wandb": False,  # log to Weights & Biases
            },
            "sampling": {
                "solver": "ddpm",  # ddpm | ddim | euler | heun | dpmpp_2m | consistency | mean_flow
                "steps": 250,  # of the solver
                "times": (),  # explicit process times from noise to clean, instead of a spacing
                "guidance_scale": 1.0,  # of classifier-free guidance; 1: none
                "guidance_interval": (),  # (low, high) in process time; empty: always
                "guidance_channels": "all",  # all | first3 (the original DiT's)
                "spacing": "",  # of the times (diffusion.schedules); empty: by solver and process
                "shift": 1.0,  # of flow's times, above 1 towards noise
                # Instead, by size: (tokens, log of the shift, more tokens, log of theirs), linear
                # between and beyond; FLUX.1's (256, 0.5, 4096, 1.15). Empty: by shift alone.
                "shift_by_tokens": (),
                "rho": 7.0,  # of EDM's times
                "ddpm": {
                    # Of a step's noise; auto: learned where the network predicts it.
                    "variance": "auto",  # auto | learned | fixed_small | fixed_large
                    "clip_denoised": False,  # clamp predicted x0 to [-1, 1] (of pixels)
                },
                "ddim": {
                    "eta": 0.0,  # noise of a step: 0 is deterministic, 1 ancestral
                    "clip_denoised": False,  # clamp predicted x0 to [-1, 1] (of pixels)
                },
                "heun": {
                    "s_churn": 0.0,  # noise added back, over all steps; 0: deterministic
                    "s_min": 0.0,  # smallest sigma / alpha at which noise is added
                    "s_max": 1e9,  # largest sigma / alpha at which noise is added
                    "s_noise": 1.0,  # standard deviation of the added noise
                },
                "batch_size": 64,  # images sampled at once, over all devices
                "weights": "ema",  # ema: the first average; or raw, or an average's own name
            },
            "autoencoder": {
                "path": "",  # the VAE that decodes latents, a diffusers folder; empty: none
                "batch_size": 16,  # images decoded at once, over all devices
                "tile": 0,  # side in latents of tiles to decode large images by; 0: whole images
            },
            "evaluation": {"num_images": 1000},  # samples that launch/evaluate.py scores
            "mesh": {  # devices along each axis; of one of them -1: all that the others leave
                "data": -1,  # parts of a batch, each with the whole state
                "fsdp": 1,  # parts of a batch among which the state is divided too
                "tensor": 1,  # parts of the network's matrices
                "sequence": 1,  # parts of an image, by rows
            },
        },
        convert_dict=True,
    ).lock()
