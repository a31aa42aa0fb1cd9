"""Trains the demo model that ships in example_workflows/models, from scratch, on drawn landscapes.

    python tests/tools/training/train_demo_model.py FOLDER [--autoencoder SECONDS] [--transformer SECONDS]

The defaults take eight minutes on one H100. It also runs on a CPU, but very slowly.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from landscapes import SCENES, SIDE, Painter
from networks import LATENT_CHANNELS, MMDiT, decoder, encoder, word_tensors
from safetensors.torch import save_file
from torch import nn

SHIFT = 3.0
"""Shift of the noise levels, SD3's default in ComfyUI."""

LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609
"""SD3's latent format. ComfyUI's TAESD undoes it with these two numbers in the file."""


class Trainer:
    def __init__(self, device, small):
        """small: small batches and little data, to try the script on a CPU."""
        self.device = device
        self.painter = Painter(4 if small else 128, device)
        self.batches = 2 if small else 384
        self.pictures_in_memory = 2 if small else 64
        self.autoencoder_batch = 2 if small else 96
        self.transformer_batch = 4 if small else 384
        self.encoder, self.decoder = (
            network.to(device, memory_format=torch.channels_last) for network in (encoder(), decoder())
        )
        self.transformer = MMDiT().to(device)
        words = [word_tensors(word) for word in SCENES]
        self.cond, self.pooled = (torch.cat(tensors).to(device) for tensors in zip(*words, strict=True))

    def autocast(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    # --- autoencoder

    def train_autoencoder(self, seconds):
        """L1 on the picture, its gradients and its coarse colours; noise on the latents makes them robust."""
        norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.05).to(self.device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=1e-5)
        pictures = torch.cat([self._bytes(self.painter.paint()[0]) for _ in range(self.pictures_in_memory)])
        for step, share in _until(seconds):
            _set_rate(optimizer, 1e-3 * min(1, step / 300) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6)
            x = self._crops(pictures)
            with self.autocast():
                z = norm(self.encoder(x).float())
                y = self.decoder(z + 0.06 * torch.randn_like(z)).float()
            loss = _picture_loss(y - x)
            _descend(optimizer, parameters, loss)
            if step % 500 == 0:
                print(f"autoencoder step {step}: loss {loss.item():.4f}", flush=True)
        self._fold_norm(norm.eval())

    def _bytes(self, pictures):
        return (pictures * 255).round().to(torch.uint8)

    def _crops(self, pictures, side=128):
        """Random squares of random pictures, at multiples of 8 pixels."""
        chosen = torch.randint(len(pictures), (self.autoencoder_batch,)).tolist()
        corners = torch.randint(0, (SIDE - side) // 8 + 1, (self.autoencoder_batch, 2)).mul(8).tolist()
        crops = [pictures[i, :, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)]
        return (torch.stack(crops).float() / 255).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _fold_norm(self, norm):
        """Let the encoder's last convolution do the normalization."""
        scale = torch.rsqrt(norm.running_var + norm.eps)
        last = self.encoder[-1]
        last.weight.mul_(scale[:, None, None, None])
        last.bias.sub_(norm.running_mean).mul_(scale)

    @torch.no_grad()
    def encode(self, pictures):
        with self.autocast():
            return self.encoder(pictures.to(memory_format=torch.channels_last)).float()

    # --- diffusion transformer

    def train_transformer(self, seconds):
        """Rectified flow with 15 % of the conditioning dropped; returns the averaged weights."""
        latents, scenes = self._latents()
        network = torch.compile(self.transformer) if self.device == "cuda" else self.transformer
        parameters = dict(self.transformer.named_parameters())
        average = {name: tensor.clone() for name, tensor in self.transformer.state_dict().items()}
        optimizer = torch.optim.AdamW(parameters.values(), 1.2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        for step, share in _until(seconds):
            _set_rate(optimizer, 1.2e-3 * min(1, step / 500) * min(1, (1 - share) / 0.35) + 1e-6)
            chosen = torch.randint(len(latents), (self.transformer_batch,), device=self.device)
            loss = self._flow_loss(network, latents[chosen].float(), scenes[chosen])
            _descend(optimizer, list(parameters.values()), loss)
            decay = min(0.999, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    average[name].lerp_(parameter, 1 - decay)
            if step % 500 == 0:
                print(f"transformer step {step}: loss {loss.item():.4f}", flush=True)
        return average

    def _latents(self):
        latents, scenes = [], []
        for _ in range(self.batches):
            pictures, scene = self.painter.paint()
            latents.append(self.encode(pictures).half())
            scenes.append(scene)
        return torch.cat(latents), torch.cat(scenes)

    def _flow_loss(self, network, latents, scenes):
        uniform = torch.sigmoid(torch.randn(len(latents), device=self.device))
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(latents)
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        kept = (torch.rand(len(latents), device=self.device) > 0.15).float()
        cond, pooled = self.cond[scenes] * kept[:, None, None], self.pooled[scenes] * kept[:, None]
        with self.autocast():
            velocity = network(mixed, sigma * 1000, cond, pooled)
        return ((velocity.float() - (noise - latents)) ** 2).mean()


def save_models(folder, transformer, trained_encoder, trained_decoder):
    """Write the three files that ship. They leave out the autoencoder's encoder, which nothing needs."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in transformer.items()}
    save_file(transformer, folder / "tiny_sd3_landscapes.safetensors")
    autoencoder = {f"taesd_encoder.{name}": tensor for name, tensor in trained_encoder.state_dict().items()}
    autoencoder |= {f"taesd_decoder.{name}": tensor for name, tensor in trained_decoder.state_dict().items()}
    autoencoder |= {"vae_scale": torch.tensor(LATENT_SCALE), "vae_shift": torch.tensor(LATENT_SHIFT)}
    autoencoder = {name: tensor.half().contiguous().cpu() for name, tensor in autoencoder.items()}
    save_file(autoencoder, folder / "tiny_taesd3_landscapes.safetensors")
    words = {word: word_tensors(word) for word in SCENES}
    conditioning = {f"{word}.cond": cond for word, (cond, _) in words.items()}
    conditioning |= {f"{word}.pooled_output": pooled for word, (_, pooled) in words.items()}
    save_file(conditioning, folder / "tiny_conditioning.safetensors")


def _picture_loss(error):
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    gradients = across.abs().mean() + down.abs().mean()
    return error.abs().mean() + 0.5 * gradients + 0.3 * F.avg_pool2d(error, 8).abs().mean()


def _until(seconds):
    """(step from 1, share of the time that has passed) until the time is over; at least one step."""
    started = time.monotonic()
    step, share = 1, 0.0
    while share < 1:
        yield step, share
        step, share = step + 1, (time.monotonic() - started) / seconds


def _set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def _descend(optimizer, parameters, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--autoencoder", type=float, default=150, metavar="SECONDS")
    parser.add_argument("--transformer", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--small", action="store_true", help="tiny batches, to see that everything runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    trainer = Trainer("cuda" if torch.cuda.is_available() else "cpu", options.small)
    trainer.train_autoencoder(options.autoencoder)
    weights = trainer.train_transformer(options.transformer)
    save_models(options.folder, weights, trainer.encoder, trainer.decoder)


if __name__ == "__main__":
    main()
