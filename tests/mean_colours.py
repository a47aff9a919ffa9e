"An encoder that knows no more than colours, to be passed as a Python object; other processes import it, too."
import numpy as np, torch
from torch import nn

class MeanColours(nn.Module):
    "The mean colour of each cell of a grid, through weights that do not learn."
    name, width, image_size = 'mean-colours', 5, 64

    def __init__(self, patches=16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.patches, self.mix = patches, nn.Linear(3, 5)

    def prepare(self, images):
        images = [np.asarray(image.resize((64, 64))) for image in images]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)/255

    def forward(self, pixels):
        side = int((self.patches or 1)**.5)
        features = self.mix(nn.functional.adaptive_avg_pool2d(pixels, side).flatten(2).transpose(1, 2))
        return features if self.patches else features[:,0]
