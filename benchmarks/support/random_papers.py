"""Rows for `random_training.PIECES`: what models of papers do (codebooks, queues, flows, low ranks, scans, routing)."""

PAPERS = """ ;; \
vstf | self.register_buffer('n{i}', torch.ones(C)); self.register_buffer('m{i}', torch.zeros(C)) | z = \
x.detach().reshape(-1, C); $n = 0.9 * $n + 0.1 * z.sigmoid().sum(0); $m = 0.9 * $m + 0.1 * z.sum(0); x = x + $m / $n \
;; vstf | self.register_buffer('n{i}', torch.ones(C)); self.register_buffer('k{i}', torch.zeros(()), \
persistent=False) | $n.lerp_(x.detach().reshape(-1, C).square().mean(0), 0.1); $k += 1; x = x * ($n + 0.1).rsqrt() + \
$k / 9 ;; vstf | self.register_buffer('q{i}', torch.zeros(3, C)) | $q = torch.cat([x.detach().reshape(-1, C).mean(0, \
keepdim=True), $q[:-1]]); x = x + $q.mean(0) ;; v | self.register_buffer('q{i}', torch.zeros(3, C)) | $q = \
torch.cat([x.detach(), $q])[:3]; x = x + $q.mean(0) ;; vstfi | self.register_buffer('n{i}', torch.zeros(())) | $n += \
1; aux = aux + ($n / 3).clamp(max=1.0) * 0.1 * x.square().mean() ;; vstf | $e = nn.Embedding(9, C) | k = \
torch.cdist(x.reshape(-1, C), $e.weight).argmin(-1).view(x.shape[:-1]); q = $e(k); aux = aux + (q - \
x.detach()).square().mean() + (x - q.detach()).square().mean(); x = x + (q - x).detach() ;; vstf | LIN; \
$l.weight.requires_grad_(False); $p = PAR(C, 2)); $q = PAR(2, C)) | x = $l(x) + x @ $p @ $q ;; vstf | $l = \
nn.Linear(C, C * C) | w = $l(x).unflatten(-1, (C, C)); x = (w @ x.unsqueeze(-1)).squeeze(-1) ;; vstf | $l = \
nn.Linear(C // 2, C) | a, b = x.chunk(2, -1); g, h = $l(a).chunk(2, -1); x = torch.cat([a, b * g.tanh().exp() + h], \
-1); aux = aux - 0.1 * g.tanh().sum(-1).mean() ;; vstf | $l = \
torch.nn.utils.parametrizations.spectral_norm(nn.Linear(C, C)) | x = $l(x) ;; vstf | $l = nn.Linear(C, 2 * C) | a, b \
= $l(x).chunk(2, -1); aux = aux - 0.05 * (1 + b - a.square() - b.exp()).sum(-1).mean(); x = a + (0.5 * b).exp() * \
torch.randn_like(a) ;; vstf | LIN; $m = nn.Linear(C, C).requires_grad_(False); $m.load_state_dict($l.state_dict()) | \
aux = aux + ($l(x) - $m(x)).square().mean(); x = $l(x) ;; vstf | LIN | x = x + 0.1 * ($l(x) - x.detach()).tanh(); x = \
x - 0.1 * (x - x.detach()) ;; v | LIN | h = F.normalize($l(x), dim=-1); aux = aux + F.cross_entropy(h @ h.T / 0.5 - 9 \
* torch.eye(x.shape[0]), (torch.arange(x.shape[0]) + x.shape[0] // 2) % x.shape[0]) ;; s | $l = nn.Linear(C, C, \
bias=False); $u = PAR(C)) | a = torch.exp(-F.softplus($u)); h = torch.zeros_like(x[:, 0]); o = []|for k in \
range(x.shape[1]): h = a * h + $l(x[:, k]); o.append(h)|x = torch.stack(o, 1) ;; s | $l = nn.Linear(C, 2) | h = \
torch.zeros(x.shape[0], 2, dtype=x.dtype)|for k in range(x.shape[1]): h = torch.logsumexp(h.unsqueeze(-1) + $l(x[:, \
k]).unsqueeze(1), 1)|aux = aux + 0.1 * h.logsumexp(-1).mean() ;; s | $p = PAR(C, C)) | a = (x @ $p @ x.mT).tril(); x \
= x + a.softmax(-1).masked_fill(a == 0, 0.0) @ x ;; s | $l = nn.Linear(C, C) | c = torch.arange(x.shape[1], \
dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype); a, b = $l(x).chunk(2, -1); x = x + torch.cat([a * \
c.cos() - b * c.sin(), b * c.cos() + a * c.sin()], -1) ;; s | $l = nn.Linear(C, C); $m = nn.Linear(C, C); $u = \
nn.Linear(C, C) | q, k, v = $l(x).relu() + 0.1, $m(x).relu() + 0.1, $u(x); x = torch.einsum('bsc,bcd->bsd', q, \
torch.einsum('bsc,bsd->bcd', k, v)) / torch.einsum('bsc,bc->bs', q, k.sum(1))[..., None] ;; s | $l = nn.Linear(C, 3) \
| w = F.one_hot($l(x).argmax(-1), 3).to(x.dtype); g = $l(x).softmax(-1); aux = aux + 3 * (w.flatten(0, 1).mean(0) * \
g.flatten(0, 1).mean(0)).sum(); x = x * (w * g).sum(-1, keepdim=True) ;; i | $l = nn.Conv2d(C, C, 3, padding=1, \
bias=False) | w = $l.weight; w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.flatten(1).std(1).view(-1, 1, 1, 1) + \
1e-3); x = x + F.conv2d(x, w, padding=1) ;; i | $l = nn.Conv2d(C, C, 1); $p = PAR(C, 1, 1)) | m = x.mean((2, 3), \
keepdim=True); x = x * $l(m).sigmoid() + $p * x.amax((2, 3), keepdim=True) ;; vstf | $p = \
nn.Parameter(torch.full((C,), 0.1)); $q = nn.Parameter(torch.zeros(2)) | x = x * $p + ($q.square().sum() + 1).log() \
;; vstf | $l = nn.ModuleDict({'a': nn.Linear(C, C), 'b': nn.Linear(C, C)}) | x = sum(k * m(x) for k, m in zip((0.3, \
0.7), $l.values())) ;; vstf | LIN | w = $l.weight / $l.weight.norm(dim=1, keepdim=True); x = F.linear(x, w) + \
F.linear(x, torch.where(w.abs() > 0.5, w, 0.0)) ;; vstf | LIN | w = $l.weight; q = (w / w.abs().max() * 7).round() * \
w.abs().max() / 7; x = F.linear(x, w + (q - w).detach(), $l.bias)
"""
