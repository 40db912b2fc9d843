"""DistriFusion's U-Net written out slowly: a thread for each device, Python lists of buffers.

After the original's modules for convolution, group normalisation and attention. Two differences:
slabs may differ in height, so means over devices are weighted by it; and the variance is that of
the pixels (the original multiplies by n / (n - 1), as our networks on one device do not).
"""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models import Network, Request
from dit_jax.models.spatial import convolve


class DeviceLoop:
    """Evaluations of a U-Net by devices with buffers; the first one is the warm-up."""

    def __init__(self, network, params, devices, mode):
        config = dataclasses.replace(network.config, remat="none")
        self.network, self.params, self.count, self.mode = Network(config), params, devices, mode
        self.buffers, self.evaluations = {}, 0
        self.barrier = threading.Barrier(devices, timeout=60)

    def __call__(self, x, t, conditions):
        units = 2 ** (len(self.network.config.channel_mult) - 1)
        own = -(-x.shape[1] // units // self.count) * units
        slabs = [x[:, i * own : (i + 1) * own] for i in range(self.count)]
        self.shares = [slab.shape[1] / x.shape[1] for slab in slabs]
        self.posted, outs, errors = {}, [None] * self.count, []

        def run(i):
            try:
                device = Device(self, i)
                outs[i] = self.network.apply(
                    self.params, Request(slabs[i], t, conditions, spatial=device)
                ).out
            except Exception as error:  # handed to the caller's thread
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        if self.evaluations == 0 or self.mode != "no_sync":
            self.buffers = self.posted
        self.evaluations += 1
        return np.concatenate([np.asarray(out) for out in outs], axis=1)


class Device:
    """What one device does in one evaluation."""

    def __init__(self, loop, index):
        self.loop, self.index, self.layers = loop, index, 0
        self.attention = self.attend

    def fresh(self, value):
        """Everyone's values of this layer, waited for."""
        layer = self.post(value)
        self.loop.barrier.wait()
        return list(self.loop.posted[layer])

    def post(self, value):
        """Leaves a value for the next evaluation."""
        layer, self.layers = self.layers, self.layers + 1
        self.loop.posted.setdefault(layer, [None] * self.loop.count)[self.index] = value
        return layer

    def stale(self, value):
        """Everyone's values of the evaluation before (fresh ones in the first)."""
        if self.loop.evaluations == 0:
            return self.fresh(value)
        return list(self.loop.buffers[self.post(value)])

    def extend(self, x, above, below):
        if not above and not below:
            return x
        boundary = (x[:, :below], x[:, x.shape[1] - above :])
        everyone = self.fresh(boundary) if self.layers == 0 else self.stale(boundary)
        before, after = jnp.zeros_like(boundary[1]), jnp.zeros_like(boundary[0])
        if self.index > 0:
            before = everyone[self.index - 1][1]
        if self.index < self.loop.count - 1:
            after = everyone[self.index + 1][0]
        return jnp.concatenate([before, x, after], axis=1)

    def convolve(self, x, kernel, *, stride=1, padding):
        x = self.extend(x, *padding[0])
        return convolve(x, kernel, stride=stride, padding=((0, 0), padding[1]))

    def group_statistics(self, x, num_groups):
        b, h, w, c = x.shape
        groups = x.astype(jnp.float32).reshape(b, h * w, num_groups, c // num_groups)
        mean, second = groups.mean((1, 3)), jnp.square(groups).mean((1, 3))
        own = jnp.stack([mean, second])
        whole = self._whole(own)
        variance = whole[1] - whole[0] ** 2
        if self.loop.mode == "corrected_async_gn":
            variance = jnp.where(variance < 0, own[1] - own[0] ** 2, variance)
        return tuple(
            jnp.repeat(a, c // num_groups, axis=-1)[:, None, None] for a in (whole[0], variance)
        )

    def _whole(self, own):
        def mean(values):
            return sum(s * value for s, value in zip(self.loop.shares, values, strict=True))

        mode, is_warmup = self.loop.mode, self.loop.evaluations == 0
        if is_warmup or mode == "sync_gn":
            return mean(self.fresh(own))
        values = self.stale(own)
        if mode == "corrected_async_gn":
            return mean(values) + own - values[self.index]
        if mode == "stale_gn":
            values[self.index] = own
            return mean(values)
        return own

    def attend(self, q, k, v, state=None):
        everyone = self.stale((k, v))
        everyone[self.index] = (k, v)
        k, v = (jnp.concatenate([pair[i] for pair in everyone], axis=1) for i in (0, 1))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v), None
