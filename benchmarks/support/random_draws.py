"""Rows for `random_training.PIECES`: statements that draw random numbers, and those that leave float64."""

DRAWS = """ ;; \
vstfi |  | x = F.dropout(x, 0.3, self.training) ;; vstf | $l = nn.Dropout(0.4) | x = $l(x) + x ;; vstfi |  | x = x + \
0.1 * torch.rand_like(x) ;; vstf |  | x = x * torch.bernoulli(torch.full_like(x, 0.7)) ;; vstf |  | x = x + 0.1 * \
torch.randn(x.shape, dtype=x.dtype) ;; v |  | x = x * (torch.rand(x.shape[0], 1) < 0.8) / 0.8 ;; s |  | x = x * \
(torch.rand(x.shape[0], 1, 1) < 0.8) / 0.8 ;; s | $l = nn.Dropout1d(0.4) | x = $l(x) ;; i | $l = nn.Dropout2d(0.4) | \
x = $l(x) ;; vstf | $l = nn.Linear(C, 3) | x = x * F.gumbel_softmax($l(x), tau=0.7)[..., :1] ;; s |  | x = x + \
F.scaled_dot_product_attention(x, x, x, dropout_p=0.2) ;; s | $l = nn.TransformerEncoderLayer(C, 2, 8, dropout=0.1, \
batch_first=True) | x = $l(x) ;; s | $l = nn.Linear(C, C) | x = checkpoint(lambda x: F.dropout($l(x), 0.3), x, \
use_reentrant=False) ;; s | $l = nn.MultiheadAttention(C, 2, dropout=0.2, batch_first=True) | x = x + $l(x, x, x)[0] \
;; vstf | $l = nn.AlphaDropout(0.2) | x = $l(x) ;; vstfi |  | x = x + 0.1 * torch.randn_like(x).detach().abs() ;; \
vstf |  | x = torch.where(torch.rand_like(x) < 0.1, x.mean(-1, keepdim=True), x) ;; vstfi |  | x = \
x.float().tanh().to(x.dtype) ;; vstf |  | x = x + (x * 8).int().to(x.dtype) / 80 ;; vstf |  | x = x * (x.half() > \
0.25) ;; vstf |  | x = x + x.to(torch.bfloat16).double().detach() * 0.1 ;; vstf | $p = \
nn.Parameter(torch.randn(C).float()) | x = x * $p ;; vstf | $l = nn.Linear(C, C, bias=False) | x = x + \
$l(x.float().double())
"""
