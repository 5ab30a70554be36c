"""Random training runs: a small model, its loss, data, optimizer and plan, all drawn from one integer.

A case is text: statements of a forward, drawn from tables by the shape of `x` that they take and give, and expressions
for the loss, the optimizer and what happens between steps. Its `source` is a module for names of torch (`nn`, `F`, ..).
Shapes: v [batch, C], s [batch, time, C], t [time, batch, C], f [batch * time, C], i [batch, C, time, 3].
Not drawn: shapes that depend on values, optimizers with closures.
"""

import random
import re
from dataclasses import dataclass
from itertools import product
from math import prod

from support.random_draws import DRAWS
from support.random_papers import PAPERS
from support.random_python import BESIDE, ODD
from support.random_steps import GROUPS, HOOKS, ODD_GROUPS, ODD_OPTIMIZERS, OPTIMIZERS, SCHEDULES

from partitioner.layout.parallel_plan import Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule

# Rows end with ;; and columns with |. $l, LIN and PAR( are short for what MEANING says.
# shape | inputs of the model and how x starts (after an optional definition)
STARTS = """
s |  | x = x0 ;; s | LIN | x = $l(x0) ;; s | $e = nn.Embedding(9, C) | x = $e(ids) ;; s | $e = nn.Embedding(9, C, \
padding_idx=0) | x = $e(ids) ;; s | $e = nn.Embedding(9, C); $o = nn.Embedding(20, C) | x = $e(ids) + $o(pos1) ;; s | \
$e = nn.Embedding(9, C); $o = nn.Embedding(20, C) | x = $e(ids) + $o(pos0) ;; s | $e = nn.Embedding(9, C) | x = \
F.linear($e(ids), $e.weight[:C]) ;; s | $p = PAR(9, C)) | x = $p[ids] ;; s | $p = PAR(9, C)) | x = F.one_hot(ids, \
9).to(x0.dtype) @ $p ;; v | $e = nn.EmbeddingBag(9, C) | x = $e(ids) ;; v | $e = nn.EmbeddingBag(9, C, mode='sum', \
padding_idx=0) | x = $e(ids) ;; v | $e = nn.EmbeddingBag(9, C, mode='max') | x = $e(ids) ;; v | LIN | x = $l(x0[:, \
-1]) ;; v |  | x = v0 ;; v | LIN | x = $l(v0) ;; s | LIN | x = $l(cfg['a']) + cfg['b'][0] * cfg['b'][1] ;; s | LIN | \
x = $l(strided) ;; s | LIN | x = $l(x0) + spread ;; i | $l = nn.Conv2d(2, C, 3, padding=1) | x = $l(pix) ;; i | $l = \
nn.Conv2d(2, C, 1, bias=False) | x = $l(pix.to(torch.float64) / 7)
"""
# shape before > shape after | definition | statements
TURNS = """
v>s |  | x = torch.stack([x, x.tanh(), x.sin()], 1) ;; v>s |  | x = x.unsqueeze(1).expand(-1, 3, -1) ;; v>s | $p = \
PAR(3, C)) | x = x.unsqueeze(1) * $p ;; v>s | $l = nn.Linear(C, 2 * C) | x = $l(x).view(-1, 2, C) ;; v>s | $l = \
nn.Linear(C, 2 * C) | x = torch.stack($l(x).chunk(2, 1), 1) ;; s>v |  | x = x.mean(1) ;; s>v |  | x = x[:, -1] ;; s>v \
|  | x = x.max(1).values ;; s>v |  | x = x.sum(dim=-2) / x.shape[1] ;; s>v |  | x = (x * msk.unsqueeze(-1)[:, \
:1]).sum(1) ;; s>v | $l = nn.Linear(C, 1) | x = ($l(x).softmax(1) * x).sum(1) ;; s>v | $p = PAR(9, C)) | x = \
torch.einsum('bsc,sc->bc', x, $p[:x.shape[1]]) ;; s>v |  | x = x.unbind(1)[0] ;; s>t |  | x = x.transpose(0, 1) ;; \
t>s |  | x = x.transpose(0, 1) ;; t>s |  | x = x.permute(1, 0, 2).contiguous() ;; t>s |  | x = torch.stack(list(x), \
1) ;; s>f |  | s = x.shape[1]; x = x.reshape(-1, C) ;; f>s |  | x = x.view(-1, s, C) ;; f>s |  | x = x.unflatten(0, \
(-1, s)) ;; s>i |  | x = x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 3) ;; s>i |  | x = torch.stack([x, \
x.sin(), x * 2], -1).transpose(1, 2) ;; i>s |  | x = x.mean(-1).transpose(1, 2) ;; i>s |  | x = x.amax(3).permute(0, \
2, 1) ;; i>v |  | x = F.adaptive_avg_pool2d(x, 1).flatten(1) ;; i>v |  | x = x.flatten(2).max(2).values
"""
# shapes that stay | definition | statements
PIECES = """
vstfi |  | x = x + first if first.shape == x.shape else x ;; vstfi |  | x = x * (1 + 0.1 * first.detach().mean()) ;; \
vstfi |  | x = x + 0.01 * sum(p.mean() for p in self.parameters()) ;; vstfi |  | x = x * \
next(self.parameters()).mean() ;; vstfi |  | x = x * (x.shape[0] / 7) ;; v |  | x = x * torch.arange(1, x.shape[0] + \
1).unsqueeze(1) / x.shape[0] ;; v |  | x = torch.cat([x, x.sin()])[: x.shape[0]] ;; v |  | x = x.repeat_interleave(2, \
0)[1::2] ;; v |  | x = F.pad(x, (0, 0, 1, 0))[:-1] ;; v |  | x = torch.tril(x @ x.T) @ x / x.shape[0] ;; v |  | x = \
x.T.softmax(-1).T ;; v |  | x = x[x[:, 0].argsort()] ;; v |  | x = x + torch.zeros(9, C, dtype=x.dtype).index_add(0, \
ids[:, 0], x)[ids[:, 0]] ;; v |  | x = torch.zeros_like(x).scatter_add(0, (ids[:, :1] % x.shape[0]).expand(-1, C), x) \
+ x ;; v |  | g = F.one_hot(ids[:, 0], 9).to(x.dtype); x = x - g @ (g.T @ x / g.sum(0).clamp(min=1)[:, None]) ;; v |  \
| x = torch.roll(x, 1) ;; v |  | x = x.flatten().cumsum(0).view_as(x) / x.numel() ;; v |  | x = x * (x > 0).sum() / \
x.numel() ;; v |  | x = x + x.argmax(0) / x.shape[0] ;; v |  | x = x.T.reshape(-1, C) + x ;; v |  | x = \
torch.stack([x, x.sin()], 1).flatten(0, 1)[::2] ;; v |  | x = torch.cat([x[:1], x[1:] - x[:-1]]) ;; v |  | x = x * \
torch.bincount(ids.flatten(), minlength=9)[:C] ;; v |  | x = (x - x.mean(0)) / (x.var(0, unbiased=False) + \
1e-5).sqrt() ;; s |  | x = x + x.transpose(0, 1).reshape(x.shape) ;; s |  | x = x.cumsum(0) / x.shape[0] ;; s |  | x \
= x.flatten(1).softmax(0).view_as(x) ;; s |  | x = torch.einsum('bsc,tsc->bs', x, x)[..., None] * x / x.shape[0] ;; s \
|  | x = x * msk[:, :1, None] / msk.sum() ;; s |  | x = x - (x * msk[:, :1, None]).sum((0, 1)) / msk[:, :1].sum() ;; \
s |  | x = x.reshape(-1, 2, C).flip(1).reshape(x.shape) if x.shape[1] % 2 == 0 else x ;; s |  | x = x.view(2, -1, \
*x.shape[1:]).flip(0).flatten(0, 1) ;; s | LIN | y = x.clone(); y[:, 0] = $l(x[:, 0]); x = y ;; s | LIN | y = \
torch.zeros_like(x); y[:, ::2] = $l(x[:, ::2]); x = x + y ;; s | LIN | y = [$l(k) for k in x.split(1, 1)]; x = \
torch.cat(y[::-1], 1) ;; s | $l = nn.ModuleList(nn.Linear(C, C) for _ in range(3)) | y = []|for m in $l: y.append(x); \
x = x + m(torch.stack(y).mean(0)) ;; s | $l = nn.ModuleList(nn.Linear(C, C) for _ in range(2)) | x = \
checkpoint(lambda x: $l[1]($l[0](x).tanh()), x, use_reentrant=False) ;; s | LIN | x = x.index_copy(1, \
torch.tensor([0]), $l(x[:, :1])) ;; s | $l = nn.Embedding(9, C, max_norm=1.0) | x = x + $l(ids[:, :1]) ;; s | $l = \
nn.Embedding(9, C, scale_grad_by_freq=True) | x = x + $l(ids[:, :1]) ;; s | LIN; $l.weight = \
nn.Parameter($l.weight.t().contiguous().t()) | x = $l(x) ;; vstf | $p = PAR(2, C, C).transpose(0, 1)) | x = x @ $p[:, \
0] + x @ $p[:, 1] ;; vstf | $p = nn.ParameterList([torch.randn(C), torch.randn(C)]) | x = x * $p[0] + $p[1] ;; vstf | \
$l = torch.nn.utils.parametrizations.orthogonal(nn.Linear(C, C)) | x = $l(x) ;; vstf | LIN | x = x + \
torch.func.functional_call($l, {'weight': $l.weight * 2, 'bias': $l.bias}, (x,)) ;; vstf | LIN | x = x + $l(x) if \
self.training else $l(x) ;; vstf | LIN; $l.register_forward_hook(lambda m, a, out: out * 2) | x = $l(x) ;; vstf | LIN \
| x = torch.vmap($l)(x) ;; vstf |  | x = x.addcmul(x, x.cos(), value=0.1).clamp(-3, 3) ;; vstf |  | x = \
x.nan_to_num().sign() * x.abs().pow(0.5) ;; vstf |  | x.requires_grad_() if not x.requires_grad else None; x = x * 2 \
;; s | $l = nn.TransformerDecoderLayer(C, 2, 8, dropout=0.0, batch_first=True) | x = $l(x, x.flip(1)) ;; s | LIN | x \
= x + $l(x.mean(0, keepdim=True)) ;; s | $l = nn.LayerNorm(C) | with torch.enable_grad(): x = $l(x) ;; vstf | LIN | x \
= $l(x) ;; vstf | $l = nn.Linear(C, C, bias=False) | x = x + $l(x) ;; vstf | $l = nn.Linear(C, 2 * C) | x = \
F.glu($l(x)) ;; vstf | $l = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)) | x = x + $l(x) ;; \
vstf | $l = nn.LayerNorm(C) | x = $l(x) ;; vstf | $l = nn.RMSNorm(C) | x = $l(x) ;; vstf | $l = nn.Bilinear(C, C, C) \
| x = $l(x, x.tanh()) ;; vstf | $l = nn.PReLU() | x = $l(x) ;; vfi | $l = nn.PReLU(C) | x = $l(x) ;; vstf |  | a, b = \
x.chunk(2, -1); x = torch.cat([b, a.tanh()], -1) ;; vstf |  | a, b = x.split([1, C - 1], -1); x = torch.cat([b, a], \
dim=-1) ;; vstf |  | x = x.softmax(-1) * C ;; vstfi |  | x = x.cumsum(1) / C ;; vstf |  | x = x.sort(-1).values ;; \
vstf |  | x = x + x.topk(2, -1).values.sum(-1, keepdim=True) ;; vstfi |  | x = x.masked_fill(x < 0, 0.1) ;; vstfi |  \
| x = x.clone(); x[..., 0] = 0.5 ;; vstf |  | x = x.clone(); x[..., 1:].mul_(0.9) ;; vsf |  | x = x.clone(); x[:, 0] \
+= 1 ;; vstfi |  | x = F.relu_(x + 0.1) ;; vstfi |  | x = (x * 1.0).add_(x, alpha=0.5) ;; vstfi |  | x = x + 1; x[x > \
1.5] = 1.5 ;; vstf |  | x = torch.stack([x, x.sin()], -1).flatten(-2)[..., ::2] + x ;; vstf |  | x = \
x.index_select(-1, torch.arange(C - 1, -1, -1)) ;; vstf |  | x = x.gather(-1, x.detach().argsort(-1)) ;; vstf |  | x \
= x.scatter(-1, torch.zeros_like(x[..., :1], dtype=torch.long), 0.3) ;; vstf | $p = PAR(C)) | x = x * $p ;; vstfi | \
$p = nn.Parameter(torch.tensor(0.5)) | x = x * $p ;; vstf | $p = PAR(C, C)) | x = torch.einsum('...i,ij->...j', x, \
$p) ;; vf | $p = PAR(C, C)) | x = torch.einsum('bi,ji->bj', x, $p) ;; s |  | x = x + torch.einsum('bst,bti->bsi', \
torch.einsum('bsi,bti->bst', x, x).softmax(-1), x) ;; vstf |  | x = \
torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2) ;; vstfi |  | x = \
torch.complex(x, x.cos()).abs() ;; vstf |  | x = torch.fft.irfft(torch.fft.rfft(x), n=C) + x.sigmoid() ;; vstfi |  | \
x = x + x.detach().round().long().to(x.dtype) * 0.1 ;; vstfi |  | x = Squash.apply(x) ;; vstfi |  | x = x + \
Straight.apply(x) ;; vstf | LIN | x = checkpoint($l, x, use_reentrant=False) ;; vstf | LIN | x = x + $l(x.detach()) \
;; vstf | LIN | x = x * $l(x).detach() ;; vstf | LIN | with torch.no_grad(): g = $l(x).sigmoid()|x = x * g ;; vstf | \
self.register_buffer('k{i}', torch.linspace(0.5, 1.5, C)) | x = x * $k ;; vstfi | self.register_buffer('n{i}', \
torch.zeros(())) | $n += 1; x = x * (1 + 0.01 * $n) ;; vstfi | self.register_buffer('n{i}', torch.zeros((), \
dtype=torch.long)) | $n.add_(1); x = x / $n ;; vstf | self.register_buffer('k{i}', torch.zeros(C)) | x = x - $k; $k = \
0.9 * $k + 0.1 * x.detach().reshape(-1, C).mean(0) ;; vstf | self.register_buffer('k{i}', torch.zeros(C)) | \
$k.mul_(0.9).add_(x.detach().reshape(-1, C).mean(0), alpha=0.1); x = x - $k ;; vstf | LIN | x = $l(torch.tanh($l(x))) \
;; vstf | LIN; $m = nn.Linear(C, C); $m.weight = $l.weight | x = $m($l(x).tanh()) ;; vstf | LIN | x = \
F.linear($l(x).tanh(), $l.weight.t()) ;; vstf | LIN; $a = $l | x = x + $a(x.sin()) ;; vstf | a = nn.Linear(C, C); $l \
= nn.ModuleList([a, nn.Linear(C, C), a]) | for layer in $l: x = torch.tanh(layer(x)) ;; vstf | LIN; $q = [$l.weight] \
| x = x @ $q[0] ;; vstfi | $u = nn.Parameter(torch.ones(2)) | x = x.clone() ;; vstf | LIN | x = x + F.linear(x, \
$l.weight[: C // 2].repeat(2, 1), $l.bias) ;; vstfi | LIN | x = x + $l.weight.mean() ;; vstf | $l = \
torch.nn.utils.parametrizations.weight_norm(nn.Linear(C, C)) | x = $l(x) ;; vstf | LIN.requires_grad_(False) | x = x \
+ $l(x) ;; vstf | $l = nn.Linear(C, 3); $p = PAR(3, C, C)) | g = $l(x).softmax(-1); x = x + \
torch.einsum('...e,...i,eij->...j', g, x, $p); aux = aux + (g.reshape(-1, 3).mean(0) ** 2).sum() ;; vstf | $l = \
nn.Linear(C, 3); $m = nn.ModuleList(nn.Linear(C, C) for _ in range(3)) | k = $l(x).topk(2, -1); g = \
torch.zeros_like($l(x)).scatter(-1, k.indices, k.values.softmax(-1)); x = sum(g[..., j:j + 1] * m(x) for j, m in \
enumerate($m)) ;; vstfi |  | x = x * gain ;; vstfi |  | x = x * temp ;; vstfi |  | x = x if absent is None else x * 0 \
;; vstfi |  | aux = aux + 0.01 * x.square().mean() ;; vstfi |  | aux = aux + 0.01 * x.abs().sum() / x.shape[0] ;; \
vstfi | $l = nn.ParameterDict({'a': nn.Parameter(torch.tensor(1.2))}) | x = x.clamp(-2, 2) * $l['a'] ;; s | $l = \
nn.Conv1d(C, C, 3, padding=1) | x = $l(x.transpose(1, 2)).transpose(1, 2) ;; s | $l = nn.Conv1d(C, C, 2) | x = \
$l(F.pad(x.mT, (1, 0))).mT ;; s | $l = nn.MultiheadAttention(C, 2, batch_first=True) | x = x + $l(x, x, x)[0] ;; s | \
$l = nn.MultiheadAttention(C, 2, batch_first=True) | x = x + $l(x, x, x, key_padding_mask=F.pad(~msk[:, 1:], (1, \
0))[:, :x.shape[1]] if x.shape[:2] == msk.shape else None, need_weights=False)[0] ;; s | $l = nn.Linear(C, 3 * C) | \
q, k, v = $l(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4); x = F.scaled_dot_product_attention(q, k, v, \
is_causal=True).transpose(1, 2).flatten(2) ;; s | $l = nn.Linear(C, 2 * C) | k, v = $l(x).chunk(2, -1); x = x + \
F.scaled_dot_product_attention(x, k, v, attn_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()) ;; s | \
$l = nn.GRU(C, C, batch_first=True) | x = $l(x)[0] ;; s | $l = nn.LSTM(C, C, batch_first=True) | x, (h, c) = $l(x); x \
= x + c.transpose(0, 1) ;; s | $l = nn.RNN(C, C, batch_first=True) | x = x + $l(x)[1][-1].unsqueeze(1) ;; s | $l = \
nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0, batch_first=True) | x = $l(x) ;; s | $l = nn.GRUCell(C, C) | h = \
torch.zeros_like(x[:, 0]); o = []|for k in range(x.shape[1]): h = $l(x[:, k], h); o.append(h)|x = torch.stack(o, 1) \
;; s | $p = PAR(1, 9, C)) | x = x + $p[:, : x.shape[1]] ;; s |  | x = F.pad(x, (0, 0, 1, 0))[:, :-1] + x ;; s |  | x \
= x.roll(1, 1) + x.flip(1) ;; s |  | x = x - x.mean(1, keepdim=True) ;; s |  | x = x / x.norm(dim=(1, 2), \
keepdim=True) ;; s | $l = nn.BatchNorm1d(C) | x = $l(x.transpose(1, 2)).transpose(1, 2) ;; s | $l = nn.BatchNorm1d(C, \
track_running_stats=False) | x = $l(x.flatten(0, 1)).view_as(x) ;; s | $l = nn.InstanceNorm1d(C, affine=True) | x = \
$l(x.mT).mT ;; s |  | x = torch.bmm(torch.softmax(x @ x.mT, -1), x) ;; s |  | x = x - x.mean(0) ;; s |  | x = x[:, \
torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))] ;; t | $l = nn.LSTM(C, C) | x = $l(x)[0] ;; t \
| $l = nn.GRU(C, C // 2, bidirectional=True) | x = $l(x)[0] ;; t | $l = nn.MultiheadAttention(C, 2) | x = x + $l(x, \
x, x)[0] ;; t | $l = nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0) | x = $l(x) ;; t | $p = PAR(9, 1, C)) | x = x + \
$p[: x.shape[0]] ;; t | LIN | x = torch.stack([$l(k).tanh() for k in x]) ;; t |  | x = x.cumsum(0) - x.flip(0) ;; t | \
 | x = torch.cat([x[1:], x[:1]]) ;; t |  | x = x - x.mean(1, keepdim=True) ;; vf | $l = nn.BatchNorm1d(C) | x = $l(x) \
;; vf | $l = nn.BatchNorm1d(C, momentum=None) | x = $l(x) ;; vf |  | x = x - x.mean(0, keepdim=True) ;; v |  | x = x \
+ x.softmax(0) ;; v |  | x = x.cumsum(0) / x.shape[0] ;; v |  | x = x + (x @ x.T).softmax(-1) @ x ;; v |  | x = x / \
(x.std(0) + 1) ;; v |  | x = x - x.max(0).values ;; v |  | x = x.flip(0) + x.roll(1, 0) ;; v |  | x = x - x[0] ;; v | \
 | x = F.normalize(x, dim=0) ;; v |  | x = torch.where(x > x.mean(), x, 0.1 * x) ;; v |  | x = x + torch.cdist(x, \
x).mean(1, keepdim=True) ;; v |  | x = x.view(2, -1, C).flip(0).reshape(-1, C) + x ;; v |  | x = torch.cat([x[::2], \
x[1::2]]) ;; v | self.register_buffer('k{i}', torch.zeros(C)) | $k.copy_(x.detach().amax(0)); x = x - 0.1 * $k ;; vs \
| $l = nn.Linear(2 * C, C) | x = $l(torch.cat([x, x.roll(1, -1)], -1)) ;; f |  | x = (x.view(-1, s, C) + x.view(-1, \
s, C).mean(1, keepdim=True)).view(-1, C) ;; f | $l = nn.Embedding(4, C) | x = x + $l(ids % 4).mean((0, 1)) ;; i | $l \
= nn.Conv2d(C, C, 3, padding=1) | x = $l(x) ;; i | $l = nn.Conv2d(C, C, 3, padding=1, groups=2, \
padding_mode='circular') | x = $l(x) ;; i | $l = nn.ConvTranspose2d(C, C, 3, padding=1) | x = $l(x) ;; i | $l = \
nn.GroupNorm(2, C) | x = $l(x) ;; i | $l = nn.InstanceNorm2d(C, affine=True) | x = $l(x) ;; i | $l = \
nn.InstanceNorm2d(C, track_running_stats=True) | x = $l(x) ;; i | $l = nn.BatchNorm2d(C) | x = F.relu($l(x), \
inplace=True) ;; i |  | x = F.max_pool2d(x, 3, 1, 1) ;; i |  | x = F.avg_pool2d(F.interpolate(x, scale_factor=2.0, \
mode='nearest'), 2) ;; i |  | x = F.max_pool2d(F.interpolate(x, scale_factor=2, mode='bilinear', \
align_corners=False), 2) ;; i | LIN | x = x * $l(x.mean((2, 3))).sigmoid()[..., None, None] ;; i |  | x = F.pad(x, \
(1, 1), mode='replicate')[..., 1:-1] + F.pad(x, (1, -1)) ;; i |  | x = F.local_response_norm(x, 2) ;; i |  | x = \
x.flatten(2).softmax(-1).view_as(x) ;; i |  | x = F.layer_norm(x, x.shape[1:]) ;; i |  | x = x.view(x.shape[0], 2, \
-1, *x.shape[2:]).transpose(1, 2).flatten(1, 2) ;; i |  | x = F.unfold(x, (1, 1)).view_as(x)
"""
# expressions over x, tgt [.., C], lab and wgt [..] (laid out as x); @ stands for a reduction
LOSSES = """
F.cross_entropy(x.reshape(-1, C), lab.flatten()@) ;; F.cross_entropy(x.reshape(-1, C), lab.flatten(), \
label_smoothing=0.1@) ;; F.cross_entropy(x.reshape(-1, C), lab.flatten(), weight=CW@) ;; \
F.cross_entropy(x.reshape(-1, C), lab.flatten(), ignore_index=0@) ;; F.cross_entropy(x.movedim(-1, 1), lab@) ;; \
F.cross_entropy(x.reshape(-1, C), tgt.reshape(-1, C).softmax(-1)@) ;; F.nll_loss(F.log_softmax(x, -1).reshape(-1, C), \
lab.reshape(-1)@) ;; F.nll_loss(x.log_softmax(-1).movedim(-1, 1), lab, weight=CW@) ;; \
F.multi_margin_loss(x.reshape(-1, C), lab.clamp(min=0).flatten()@) ;; F.multilabel_soft_margin_loss(x.reshape(-1, C), \
(tgt > 0).to(x.dtype).reshape(-1, C)@) ;; F.multilabel_margin_loss(x.reshape(-1, C), (tgt > 0).long().reshape(-1, \
C)@) ;; F.binary_cross_entropy_with_logits(x, (tgt > 0).to(x.dtype)@) ;; F.binary_cross_entropy_with_logits(x, (tgt > \
0).to(x.dtype), pos_weight=CW@) ;; F.binary_cross_entropy_with_logits(x, tgt.sigmoid(), weight=wgt.unsqueeze(-1)@) ;; \
F.binary_cross_entropy(x.sigmoid(), tgt.sigmoid()@) ;; F.cross_entropy(x.reshape(len(x), -1) @ tgt.reshape(len(x), \
-1).T, torch.arange(len(x))) ;; (F.cross_entropy(x.flatten(1) @ tgt.flatten(1).T, torch.arange(x.shape[0])) + \
F.cross_entropy(tgt.flatten(1) @ x.flatten(1).T, torch.arange(x.shape[0]))) / 2 ;; (x.reshape(-1, C).T @ \
tgt.reshape(-1, C) / x.shape[0] - torch.eye(C)).square().sum() ;; F.mse_loss(x, (tgt - tgt.mean(0)) / (tgt.std(0) + \
0.1)@) ;; F.mse_loss(x, tgt / tgt.abs().max()@) ;; F.cross_entropy(x.reshape(-1, C), lab.clamp(min=0).flatten(), \
weight=1 / (F.one_hot(lab.clamp(min=0).flatten(), C).sum(0) + 1.0)@) ;; ((x - tgt).square().mean(-1) * wgt / \
wgt.mean()).mean() ;; ((x - tgt).square().mean(-1) * wgt.softmax(0)).sum() ;; F.relu(1 - (x.var(0) + \
1e-4).sqrt()).mean() ;; -(x.softmax(-1).flatten(0, -2).mean(0) * x.softmax(-1).flatten(0, -2).mean(0).log()).sum() ;; \
(x - tgt).square().mean(tuple(range(1, x.dim()))).sort().values[: len(x) // 2].mean() ;; (x - \
tgt).square().mean(0).sum() ;; (x.mean(0) - tgt.mean(0)).square().sum() ;; (x.flatten() @ tgt.flatten()) / x.shape[0] \
;; torch.nn.functional.pdist(x.reshape(len(x), -1)).mean() ;; (x - x.roll(1, 0)).square().mean() ;; ((x - \
tgt).square() * (lab >= 0).unsqueeze(-1)).sum() / ((lab >= 0).sum() * C) ;; ((x - tgt).square().mean(-1) * (wgt > \
wgt.mean())).sum() / (wgt > wgt.mean()).sum() ;; (x - tgt).square().mean() / (tgt - tgt.mean()).square().mean() ;; (x \
- tgt).square().mean() / (x.detach().square().mean() + 1) ;; (x - tgt).abs().mean().clamp(max=1.0) ;; \
torch.sigmoid((x - tgt).mean()) ;; (x - tgt).square().sum(-1).sqrt().sum() / (lab.numel() + 1) ;; \
F.cross_entropy(x.reshape(-1, C), lab.flatten(), reduction='none').clamp(max=2.0).mean() ;; \
(F.nll_loss(x.log_softmax(-1).reshape(-1, C), lab.clamp(min=0).flatten(), reduction='none') * (1 - \
x.softmax(-1).reshape(-1, C).gather(1, lab.clamp(min=0).reshape(-1, 1)).squeeze(1)) ** 2).mean() ;; (1 - (2 * \
(x.sigmoid() * (tgt > 0)).flatten(1).sum(1) + 1) / (x.sigmoid().flatten(1).sum(1) + (tgt > 0).flatten(1).sum(1) + \
1)).mean() ;; torch.logaddexp(x, tgt).mean() ;; F.ctc_loss(x.reshape(len(x), -1, C).transpose(0, 1).log_softmax(-1), \
lab.reshape(len(x), -1)[:, :1].clamp(min=1), torch.full((len(x),), x.reshape(len(x), -1, C).shape[1]), \
torch.ones(len(x), dtype=torch.long)@) ;; F.mse_loss(x, tgt@) ;; F.mse_loss(x, tgt, \
weight=wgt.unsqueeze(-1).expand_as(x)@) ;; F.l1_loss(x, tgt@) ;; F.smooth_l1_loss(x, tgt, beta=0.5@) ;; \
F.huber_loss(x, tgt, delta=0.7@) ;; F.kl_div(x.log_softmax(-1), tgt.softmax(-1)@) ;; F.kl_div(x.log_softmax(-1), \
tgt.log_softmax(-1), log_target=True@) ;; F.kl_div(x.log_softmax(-1), tgt.softmax(-1), reduction='batchmean') ;; \
F.poisson_nll_loss(x, tgt.abs()@) ;; F.gaussian_nll_loss(x, tgt, F.softplus(x) + 0.1@) ;; F.hinge_embedding_loss(x, \
tgt.sign()@) ;; F.cosine_embedding_loss(x.reshape(-1, C), tgt.reshape(-1, C), tgt.reshape(-1, C)[:, 0].sign()@) ;; \
F.margin_ranking_loss(x[..., 0], x[..., 1], tgt[..., 0].sign(), margin=0.1@) ;; F.triplet_margin_loss(x.reshape(-1, \
C), tgt.reshape(-1, C), tgt.reshape(-1, C).flip(-1)@) ;; F.pairwise_distance(x, tgt).mean() ;; (1 - \
F.cosine_similarity(x, tgt, dim=-1)).mean() ;; ((x - tgt).square().mean(-1) * wgt).sum() / wgt.sum() ;; ((x - \
tgt).abs().sum(-1) * (lab > 0)).sum() / (lab > 0).sum() ;; (F.cross_entropy(x.reshape(-1, C), lab.flatten(), \
reduction='none') * (lab.flatten() >= 0)).sum() / (lab >= 0).sum().clamp(min=1) ;; F.cross_entropy(x.reshape(-1, C), \
lab.flatten(), reduction='sum') / (lab != -100).sum() ;; (F.cross_entropy(x.reshape(-1, C), lab.flatten(), \
reduction='none').view(lab.shape) * wgt).flatten(1).mean(1).sum() / x.shape[0] ;; ((x - tgt).square().mean(-1) * \
wgt).flatten(1).sum(1).div(wgt.flatten(1).sum(1)).mean() ;; (x - tgt).square().sum() / x.numel() ;; (x - \
tgt).square().sum() / len(x) ;; (x - tgt).square().mean().sqrt() ;; (x - tgt).norm() ;; (x * tgt).sum() / (x.norm() * \
tgt.norm()) ;; ((x - x.mean()) * (tgt - tgt.mean())).mean() / (x.std() * tgt.std()) ;; torch.logsumexp(x.flatten(), \
0) ;; (x - tgt).abs().max() ;; (x - tgt).abs().median() ;; x.var() + x.mean() ;; (x.logsumexp(-1) - (x * \
F.one_hot(lab.clamp(min=0), C)).sum(-1)).mean() ;; torch.where(tgt > 0, (x - tgt).square(), 0.3 * (x - \
tgt).square()).mean() ;; (x - tgt)[..., 0].square().mean() + (x - tgt)[..., 1:].abs().sum(-1).mean() ;; torch.dist(x, \
tgt) ;; x.logsumexp(-1).square().mean() * 1e-2 ;; (x - tgt).square().topk(2, -1).values.mean() ;; (x - \
tgt).square().flatten(1).mean(1).max() ;; (F.softplus(-x) * tgt.sigmoid()).mean(-1).sum() ;; \
-(x.log_softmax(-1).gather(-1, lab.clamp(min=0).unsqueeze(-1))).mean() ;; torch.linalg.vector_norm(x - tgt, \
dim=-1).mean() ;; x.square().mean() * x.shape[0] ** 0.5
"""
FORMS = """
{a} ;; {a} ;; {a} ;; {a} * 0.5 ;; {a} / x.shape[0] ;; {a} * x.numel() ;; {a} + 0.1 * {b} ;; {a} * {b} ;; {a} / (1 + \
{b}.abs()) ;; ({a}.abs() + {b}.abs()).sqrt() ;; torch.exp(-{a}.abs()) ;; torch.stack([{a}, {b}]).sum() ;; \
torch.maximum({a}, {b}) ;; torch.where({a} > {b}, {a}, 0.5 * {b}) ;; ({a} + {b}) / 2 ;; torch.log1p({a}.abs()) ;; \
{a}.square() ;; 0.3 * {a} + 0.7 * {b} ;; {a} - {b}.detach() ;; {a} + {b} / lab.numel() ;; {a} / {a}.detach().abs() ;; \
{a} + 1e-2 * sum(p.square().sum() for p in self.parameters()) ;; {a} if self.training else 0 * {a} ;; -{a} ;; {a} * \
gain ;; {a} + temp * {b} ;; sum([{a}, {b}]) / len([1, 2])
"""
REDUCTIONS = """
{} ;; {} ;; {} ;; {sum} ;; {sum} / x.shape[0] ;; {none}.mean() ;; {none}.sum() ;; {none}.sum() / x.numel()
"""
RETURNS = """
{} ;; {} ;; dict(loss={}, x=x) ;; ({}, x) ;; SimpleNamespace(loss={}, x=x)
"""
OUTPUTS = """
x ;; x ;; dict(x=x) ;; (x, x.mean()) ;; SimpleNamespace(x=x)
"""
STEPS = (2, 2, 3)
MEANING = {"LIN": "$l = nn.Linear(C, C)", "PAR(": "nn.Parameter(torch.randn("}
INPUTS = (
    "x0", "v0", "ids", "tgt", "lab", "wgt", "msk", "pos0", "pos1", "gain", "temp", "absent", "cfg", "strided", "spread",
    "pix", "flag", "mode", "deep", "half", "wish",
)  # fmt: skip
LAYOUTS = {"v": "", "s": "", "t": "{n} = {n}.transpose(0, 1)", "f": "{n} = {n}.flatten(0, 1)"}  # of targets


@dataclass(frozen=True, slots=True)
class Case:
    """A training run as text; `pieces` are (definition, statements), `sizes` (batch, time) of every step."""

    seed: int
    pieces: tuple[tuple[str, str], ...]
    loss: str
    output: str  # what the model returns
    takes: str  # how the loss function takes the batch; "": the model returns the loss
    optimizer: str
    schedule: str
    hooks: tuple[str, ...]  # before every step
    clip_norm: float | None
    sizes: tuple[tuple[int, int], ...]
    target: tuple[str, int]  # the last shape, and its time (0: the batch's)
    plan: Plan

    def __str__(self) -> str:
        body = "; ".join(f"{define and define + ' :: '}{run}" for define, run in self.pieces)
        hooks = f" hooks={[h for h in self.hooks if h]}" if any(self.hooks) else ""
        more = f"{self.schedule and ' ' + self.schedule}{f' clip {self.clip_norm}' if self.clip_norm else ''}{hooks}"
        how = f"loss_fn({self.takes}) of {self.output}: " if self.takes else f"{self.output} of "
        return f"[{self.seed}] {body} -> {how}{self.loss}\n    {self.optimizer}{more} sizes={self.sizes} {self.plan}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The batch's entries: those that the text names."""
        text = " ".join([*(run for _, run in self.pieces), self.loss])
        return tuple(name for name in INPUTS if re.search(rf"\b{name}\b", text))

    @property
    def source(self) -> str:
        """The module `M`, and `loss_fn` if there is one."""
        defined = [line for define, _ in self.pieces for line in define.split("|") if line]
        ran = [line for _, run in self.pieces for line in run.split("|")]
        ran.insert(1, "first = x")
        names = [n for n in ("tgt", "lab", "wgt") if re.search(rf"\b{n}\b", self.loss)]
        laid = [LAYOUTS[self.target[0]].format(n=n) for n in names if LAYOUTS[self.target[0]]]
        loss = self.output.format(f"({self.loss}) + aux")
        last = [f"return {self.output}"] if self.takes else [*laid, f"return {loss}"]
        lines = ["class M(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in defined]
        lines += [
            f"    def forward(self, {', '.join(f'{n}=None' for n in self.inputs)}):",
            "        aux = 0.0",
        ]
        lines += [f"        {line}" for line in [*ran, *last]]
        if self.takes:
            known = {"x": "output", "dict(x=x)": "output['x']", "(x, x.mean())": "output[0]"}
            got = known.get(self.output, "output.x")
            given = [f"{n} = batch['{n}']" for n in self.inputs] if self.takes == "output, batch" else []
            taken = self.takes.format(", ".join([*names, "**_"]))
            lines += [f"def loss_fn({taken}):", f"    x = {got}", *(f"    {k}" for k in [*given, *laid])]
            lines += [f"    return {self.loss}"]
        return "\n".join(lines) + "\n"


def table(text: str) -> list[list[str]]:
    """Rows of columns."""
    for short, meant in MEANING.items():
        text = text.replace(short, meant)
    return [row.split(" | ") for row in re.sub(r"\$([a-z])", r"self.\1{i}", text).strip("\n").split(" ;; ")]


def texts(table_of_one: str) -> list[str]:
    """Rows of one column."""
    return [row[0] for row in table(table_of_one)]


def random_case(seed: int) -> Case:
    """The case of a number: always the same."""
    draw = random.Random(seed)
    pieces, target = _pieces(draw)
    plan = _plan(draw)
    takes = draw.choice(("", "", "output, {}", "output, batch"))
    steps = draw.choice(STEPS)
    loss = _loss(draw, has_model=not takes)
    kinds, groups = (
        (OPTIMIZERS, GROUPS) if draw.random() < 0.95 else (ODD_OPTIMIZERS, GROUPS + " ;; " + ODD_GROUPS)
    )
    optimizer = draw.choice(texts(kinds)).format(draw.choice(texts(groups)))
    return Case(
        seed, pieces, loss, draw.choice(texts(OUTPUTS if takes else RETURNS)), takes, optimizer,
        draw.choice(texts(SCHEDULES)) if draw.random() < 0.2 else "",
        tuple(draw.choice(texts(HOOKS)) if k and draw.random() < 0.12 else "" for k in range(steps)),
        0.5 if draw.random() < 0.25 else None, _sizes(draw, plan, steps), target, plan,
    )  # fmt: skip


def _pieces(draw: random.Random) -> tuple[tuple[tuple[str, str], ...], tuple[str, int]]:
    shape, define, run = draw.choice(table(STARTS))
    chosen, time, turns = [(define, run)], 0, table(TURNS)
    for _ in range(draw.randint(2, 6)):
        if draw.random() < 0.3:
            way, *text = draw.choice([row for row in turns if row[0][0] == shape])
            time = (2 if "2 * C" in text[0] else 3) if way == "v>s" else time
            shape = way[2]
        else:
            rows = PIECES + DRAWS + PAPERS + BESIDE if draw.random() < 0.98 else BESIDE + ODD
            _, *text = draw.choice([row for row in table(rows) if shape in row[0]])
        chosen.append((text[0], text[1]))
    if shape == "i":
        _, *text = draw.choice([row for row in turns if row[0] == "i>s"])
        chosen, shape = [*chosen, (text[0], text[1])], "s"
    numbered = [(d.replace("{i}", str(k)), r.replace("{i}", str(k))) for k, (d, r) in enumerate(chosen)]
    return tuple(numbered), (shape, time)


def _loss(draw: random.Random, *, has_model: bool) -> str:
    form = draw.choice([f for f in texts(FORMS) if has_model or "self" not in f])
    return form.format(a=_term(draw), b=_term(draw))


def _term(draw: random.Random) -> str:
    term = draw.choice(texts(LOSSES))
    if "@)" not in term:
        return f"({term})"
    how = draw.choice(texts(REDUCTIONS))
    kinds = {r: term.replace("@)", f", reduction='{r}')") for r in ("sum", "none")}
    return how.format(term.replace("@)", ")"), **kinds)


def _plan(draw: random.Random) -> Plan:
    degrees = product((1, 1, 2, 2, 3, 4), (1, 1, 1, 2), (1, 1, 2, 3))
    dp, tp, pp = draw.choice([d for d in degrees if prod(d) in (1, 2, 3, 4, 8)])  # whole hosts of "laptop"
    return Plan(
        dp, tp, pp, zero=draw.randint(0, 1), microbatches=draw.choice((1, 1, 2, 4)),
        schedule=draw.choice(tuple(PipelineSchedule)), bucket_bytes=draw.choice((64, 400, 25_000_000)),
    )  # fmt: skip


def _sizes(draw: random.Random, plan: Plan, steps: int) -> tuple[tuple[int, int], ...]:
    parts = plan.dp * plan.microbatches
    sizes = [size for size in range(parts, 13, parts) if size >= 4] or [parts]
    size, time = draw.choice(sizes), draw.randint(2, 5)
    last = draw.choice(sizes) if draw.random() < 0.3 else size
    last_time = draw.randint(2, 5) if draw.random() < 0.2 else time
    return (*[(size, time)] * (steps - 1), (last, last_time))
